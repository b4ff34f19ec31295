"""Asking a server about one prompt, for ``sgl-blend explain``: a prompt that is sent for it, or a
request that is over."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from urllib.parse import quote

from sgl_blend.cli.explaining import Asked
from sgl_blend.errors import ConfigError
from sgl_blend.harness.client import Answer, Client, ServerError, greedy

#: log-probabilities asked for at each output position: exact's likeliest tokens, and enough of the
#: blended answer's that they are nearly always among them
EXACT_TOP, BLENDED_TOP = 20, 200


def ask(
    client: Client,
    prompt: str,
    new_tokens: int,
    custom: Mapping[str, Any],
    tenant: Mapping[str, Any],
    progress: Callable[[str], None],
) -> Asked:
    """Blended first: the exact KV of the other would be found as a prefix. Raises ServerError."""
    progress("the prompt's tokens")
    found = client.json("POST", "/tokenize", {"prompt": prompt})
    ids = [int(i) for i in found["tokens"]]
    texts = _texts(client, ids)
    progress("the answer, blended")
    said = {**custom, "blend_explain": True}
    blended = _answer(client, ids, new_tokens, BLENDED_TOP, said, tenant)
    progress("the answer, by exact prefill")
    exact = _answer(client, ids, new_tokens, EXACT_TOP, {"blend": False}, tenant)
    return Asked(_model(client), tuple(ids), texts, blended, exact)


def ask_about(
    client: Client, admin: Client, rid: str, new_tokens: int, progress: Callable[[str], None]
) -> Asked:
    """The request ``rid``, which the server has kept. admin: asks with the key of those who may
    read it. new_tokens: what exact prefill is asked for, 0: nothing. Raises ConfigError where it is
    not kept, ServerError."""
    progress("what the server has kept")
    answer = admin.send("GET", f"/blend_explain?id={quote(rid, safe='')}", also=(401, 403, 404))
    if answer.status_code != 200:
        raise ConfigError(f"--request {rid}: {_message(answer)}")
    kept = answer.json()
    ids = [int(i) for i in kept["ids"]]
    output = [int(i) for i in kept["output"]]
    new_tokens = min(new_tokens, len(output) or new_tokens)
    words = _texts(client, [*ids, *output])
    said = [[None, i, text] for i, text in zip(output, words[len(ids) :], strict=True)]
    report = {**kept["report"], "explain": kept["explain"]}
    text = _text(client, output)
    meta = {"blend": report, "output_token_logprobs": said[:new_tokens]}
    blended = Answer(text, tuple(output), meta)
    exact, why = None, ""
    if not new_tokens:
        why = "the server was not asked (--tokens 0)"
    elif kept["adapter"]:
        why = "the request ran with a LoRA adapter, whose name is not kept"
    else:
        progress("what exact prefill says")
        # Under a tenant that nobody else is: the exact KV of this prompt is no one's to find.
        alone = {"cache_salt": secrets.token_hex(16)}
        exact = _answer(client, ids, new_tokens, EXACT_TOP, {"blend": False}, alone)
    return Asked(
        _model(client), tuple(ids), words[: len(ids)], blended, exact, rid, why, kept["earlier"]
    )


def _answer(
    client: Client,
    ids: Sequence[int],
    new_tokens: int,
    top: int,
    said: Mapping[str, Any],
    tenant: Mapping[str, Any],
) -> Answer:
    body = greedy(ids, new_tokens, said) | {"return_logprob": True, "top_logprobs_num": top}
    return client.stream({**body, "return_text_in_logprobs": True, **tenant})


def _texts(client: Client, ids: Sequence[int]) -> tuple[str, ...]:
    """Each token's own."""
    if not ids:
        return ()
    body = {"tokens": [[i] for i in ids], "skip_special_tokens": False}
    return tuple(client.json("POST", "/detokenize", body)["text"])


def _text(client: Client, ids: Sequence[int]) -> str:
    if not ids:
        return ""
    text: str = client.json("POST", "/detokenize", {"tokens": list(ids)})["text"]
    return text


def _model(client: Client) -> str:
    info = client.json("GET", "/model_info")
    return str(info.get("served_model_name") or info.get("model_path"))


def _message(answer: Any) -> str:
    """Why the server told nothing. A route that is not there is none of an old or plain server."""
    try:
        error = answer.json().get("error")
    except ValueError:
        raise ServerError(f"/blend_explain answered {answer.status_code}") from None
    if isinstance(error, dict):
        return str(error.get("message"))
    if answer.status_code == 404:
        return "the server has no /blend_explain: launch it with --enable-blend"
    return f"{error}: give the server's --admin-api-key"
