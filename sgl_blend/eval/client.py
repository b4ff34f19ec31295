"""One greedy request to a running SGLang server, with log-probabilities, timed from outside."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import requests

from sgl_blend.eval.cost import Tokens, read_tokens
from sgl_blend.eval.fidelity import Output
from sgl_blend.harness.server import ServerError

TIMEOUT = 1800.0
FLUSH_WAIT = 30.0


@dataclass(frozen=True, slots=True)
class Reply:
    """ttft: seconds to the first token. output: log-probabilities of the tokens asked for."""

    ttft: float
    text: str
    output: Output
    tokens: Tokens


@dataclass(frozen=True, slots=True)
class Wanted:
    """Log-probabilities at each output position: the ``top`` likeliest, or those of ``ids``."""

    top: int = 0
    ids: tuple[int, ...] = ()


class Client:
    """Talks to one server. Not for several threads. Raises :class:`ServerError`."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")

    def tokenizer_path(self) -> str:
        """Where the server's tokenizer lies, as the server says."""
        r = self._send("GET", "/model_info", timeout=30.0)
        _check("/model_info", r)
        info = r.json()
        path = info.get("tokenizer_path") or info.get("model_path")
        if not path:
            raise ServerError("/model_info names no tokenizer; give --tokenizer")
        return path

    def flush(self) -> None:
        """Empty the server's caches; it must be idle, or become so within ``FLUSH_WAIT``."""
        # The route can wait by itself (?timeout=), but looks once a second.
        deadline = time.monotonic() + FLUSH_WAIT
        while True:
            r = self._send("POST", "/flush_cache", timeout=60.0)
            if r.status_code == 200 or time.monotonic() > deadline:
                return _check("/flush_cache", r)
            time.sleep(0.02)

    def ask(
        self,
        ids: Sequence[int],
        *,
        custom: Mapping[str, Any],
        max_new_tokens: int,
        wanted: Wanted | None = None,
        salt: str | None = None,
    ) -> Reply:
        """Stream a request; TTFT ends when the first token arrives."""
        wanted = wanted or Wanted()
        body: dict[str, Any] = {
            "input_ids": list(ids),
            "sampling_params": {
                "temperature": 0,
                "max_new_tokens": max_new_tokens,
                "custom_params": dict(custom),
            },
            "stream": True,
        }
        if wanted.top or wanted.ids:
            body["return_logprob"] = True
            body["top_logprobs_num"] = wanted.top
            if wanted.ids:
                body["token_ids_logprob"] = list(wanted.ids)
        if salt is not None:
            body["cache_salt"] = salt
        start = time.perf_counter()
        ttft: float | None = None
        last: bytes | None = None
        report: dict[str, Any] | None = None
        try:
            with requests.post(
                self.url + "/generate", json=body, stream=True, timeout=TIMEOUT
            ) as r:
                _check("/generate", r)
                for line in r.iter_lines():
                    if not line.startswith(b"data: ") or line == b"data: [DONE]":
                        continue
                    ttft = ttft or time.perf_counter() - start
                    last = line[6:]
                    # Pieces repeat all log-probabilities so far; most need not be looked at.
                    if report is None and b'"blend"' in last:
                        report = json.loads(last).get("meta_info", {}).get("blend")
        except requests.RequestException as e:
            raise ServerError(f"no answer from {self.url}/generate: {e}") from None
        if last is None or ttft is None:
            raise ServerError("/generate closed without an answer")
        answer = json.loads(last)
        if "error" in answer:
            raise ServerError(f"/generate failed: {answer['error']}")
        return _reply(ttft, answer, report, wanted)

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
                {"temperature": 0, "max_new_tokens": 1, "custom_params": dict(c)} for c in custom
            ],
        }
        if salt is not None:
            body["cache_salt"] = salt
        try:
            r = requests.post(self.url + "/generate", json=body, timeout=TIMEOUT)
        except requests.RequestException as e:
            raise ServerError(f"no answer from {self.url}/generate: {e}") from None
        _check("/generate", r)

    def _send(self, method: str, path: str, timeout: float) -> requests.Response:
        try:
            return requests.request(method, self.url + path, timeout=timeout)
        except requests.RequestException as e:
            raise ServerError(f"no answer from {self.url}{path}: {e}") from None


def _check(path: str, r: requests.Response) -> None:
    if r.status_code != 200:
        raise ServerError(f"{path} answered {r.status_code}: {r.text[:500]}")


def _reply(
    ttft: float, answer: dict[str, Any], report: dict[str, Any] | None, wanted: Wanted
) -> Reply:
    meta = answer["meta_info"]
    ids = tuple(answer.get("output_ids", ()))
    rows: list[dict[int, float]] = []
    if wanted.top or wanted.ids:
        key = "output_token_ids_logprobs" if wanted.ids else "output_top_logprobs"
        rows = [{int(e[1]): float(e[0]) for e in row} for row in meta[key]]
        if len(rows) != len(ids):
            raise ServerError(f"{len(ids)} output tokens, but {key} has {len(rows)} rows")
    tokens = read_tokens(int(meta["prompt_tokens"]), report)
    return Reply(ttft, answer.get("text", ""), Output(ids, tuple(rows)), tokens)
