"""One greedy request to a running SGLang server, with log-probabilities, timed from outside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sgl_blend.eval.cost import Tokens, read_tokens
from sgl_blend.eval.fidelity import Output
from sgl_blend.harness import client
from sgl_blend.harness.client import Answer, ServerError, answer_of, greedy


@dataclass(frozen=True, slots=True)
class Reply:
    """ttft: seconds to the first token. output: log-probabilities of the tokens asked for."""

    ttft: float
    text: str
    output: Output
    tokens: Tokens


@dataclass(frozen=True, slots=True)
class Wanted:
    """Log-probabilities at each output position: the ``top`` likeliest, or those of ``ids``; first:
    what is wanted of the first position besides, in a request of its own."""

    top: int = 0
    ids: tuple[int, ...] = ()
    first: Wanted | None = None


class Client(client.Client):
    """What an evaluation asks of one server. Raises :class:`ServerError`."""

    def tokenizer_path(self) -> str:
        """Where the server's tokenizer lies, as the server says."""
        info = self.json("GET", "/model_info", timeout=30.0)
        path = info.get("tokenizer_path") or info.get("model_path")
        if not path:
            raise ServerError("/model_info names no tokenizer; give --tokenizer")
        return path

    def ask(
        self,
        ids: Sequence[int],
        *,
        custom: Mapping[str, Any],
        max_new_tokens: int,
        wanted: Wanted | None = None,
        salt: str | None = None,
        timed: bool = True,
    ) -> Reply:
        """One request. ``timed``: streamed; TTFT ends when the first token arrives. Else in one
        piece, without TTFT: streaming says all log-probabilities so far again with each token."""
        wanted = wanted or Wanted()
        body = greedy(ids, max_new_tokens, custom)
        if wanted.top or wanted.ids:
            body["return_logprob"] = True
            body["top_logprobs_num"] = wanted.top
            if wanted.ids:
                body["token_ids_logprob"] = list(wanted.ids)
        if salt is not None:
            body["cache_salt"] = salt
        return _reply(self.stream(body) if timed else answer_of(self.generate(body)), wanted)

    def warm(
        self,
        prompts: Sequence[Sequence[int]],
        custom: Sequence[Mapping[str, Any]],
        salt: str | None = None,
    ) -> None:
        """Let the server see ``prompts``, all in one request; what it answers does not matter."""
        if not prompts:
            return
        body: dict[str, Any] = {
            "input_ids": [list(p) for p in prompts],
            "sampling_params": [
                greedy(p, 1, c)["sampling_params"] for p, c in zip(prompts, custom, strict=True)
            ],
        }
        if salt is not None:
            body["cache_salt"] = salt
        self.generate(body)


def _reply(answer: Answer, wanted: Wanted) -> Reply:
    rows: list[dict[int, float]] = []
    if wanted.top or wanted.ids:
        key = "output_token_ids_logprobs" if wanted.ids else "output_top_logprobs"
        rows = [{int(e[1]): float(e[0]) for e in row} for row in answer.meta[key]]
        if len(rows) != len(answer.tokens):
            raise ServerError(f"{len(answer.tokens)} output tokens, but {key} has {len(rows)} rows")
    tokens = read_tokens(int(answer.meta["prompt_tokens"]), answer.blend)
    return Reply(answer.ttft, answer.text, Output(answer.tokens, tuple(rows)), tokens)
