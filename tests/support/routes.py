"""Every HTTP route of SGLang 0.5.23 that runs prompts of text through the test model: what is sent
to it, and where its answer carries the report. (``/v1/systemone`` wants a tokenizer whose yes and
no are one token each.) Needs: a running server."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import requests

from sgl_blend.harness.server import Server

Body = dict[str, Any]
DONE = b"[DONE]"


def _generate(text: str) -> Body:
    return {"text": text, "sampling_params": {"max_new_tokens": 4, "temperature": 0}}


def _completions(text: str) -> Body:
    return {"model": "default", "prompt": text, "max_tokens": 4, "temperature": 0}


def _chat(text: str) -> Body:
    return {"model": "default", "messages": [{"role": "user", "content": text}], "max_tokens": 4}


def _responses(text: str) -> Body:
    return {"model": "default", "input": text, "max_output_tokens": 4, "store": False}


def _score(text: str) -> Body:
    return {"model": "default", "query": text, "items": [" a"], "label_token_ids": [7, 9]}


def _decisions(text: str) -> Body:
    options = [{"name": "a"}, {"name": "b"}]
    question = {"id": "q", "type": "choice", "question": "Which?", "options": options}
    return {"input": text, "questions": [question]}


def _ollama_chat(text: str) -> Body:
    messages = [{"role": "user", "content": text}]
    return {"model": "x", "messages": messages, "options": {"num_predict": 4}, "stream": False}


def _ollama_generate(text: str) -> Body:
    return {"model": "x", "prompt": text, "options": {"num_predict": 4}, "stream": False}


def _vertex(text: str) -> Body:
    return {"instances": [{"text": text}], "parameters": {"sampling_params": {"max_new_tokens": 4}}}


def served_name(server: Server) -> str:
    return requests.get(server.url + "/v1/models", timeout=60).json()["data"][0]["id"]


@dataclass(frozen=True)
class Route:
    """body: of a request for ``text``. streams: takes ``stream``. params: where in the body
    ``custom_params`` belongs, keys from the top. usage: keys of the details in the answer."""

    path: str
    body: Callable[[str], Body]
    streams: bool = False
    params: tuple[str, ...] = ()
    usage: tuple[str, ...] = ()

    def send(
        self, server: Server, text: str, said: str | None = None, **more: Any
    ) -> requests.Response:
        """said: the header ``x-blend``; ``custom``: custom_params; others go into the body."""
        body = self.body(text)
        if self.path == "/v1/responses":
            body["model"] = served_name(server)
        custom = more.pop("custom", None)
        if custom is not None:
            where = body
            for key in self.params:
                where = where[key]
            where["custom_params"] = custom
        headers = {} if said is None else {"x-blend": said}
        return requests.post(
            server.url + self.path, json={**body, **more}, headers=headers, timeout=120
        )


_IN = ("usage", "input_tokens_details")
_PROMPT = ("usage", "prompt_tokens_details")
ROUTES = (
    Route("/generate", _generate, True, ("sampling_params",)),
    Route("/v1/completions", _completions, True, (), _PROMPT),
    Route("/v1/chat/completions", _chat, True, (), _PROMPT),
    Route("/invocations", _chat, True, (), _PROMPT),
    Route("/v1/responses", _responses, True, (), _IN),
    Route("/v1/messages", _chat, True, (), _IN),
    Route("/v1/score", _score, False, (), _PROMPT),
    Route("/v1/decisions", _decisions, False, (), _PROMPT),
    Route("/api/chat", _ollama_chat, True),
    Route("/api/generate", _ollama_generate, True),
    Route("/vertex_generate", _vertex, False, ("parameters", "sampling_params")),
)


def report_of(body: Any) -> dict[str, Any]:
    """The report in an answer, or in an event of a stream."""
    if "predictions" in body:
        body = body["predictions"][0]
    for key in ("meta_info", "response", "message"):
        inner = body.get(key)
        if isinstance(inner, dict) and "blend" in inner:
            body = inner
            break
    report = body["blend"]
    assert isinstance(report, dict), report
    return report


def details_of(body: Any, keys: tuple[str, ...]) -> dict[str, int]:
    """The details of usage; in an event of a stream they stand in what it carries."""
    for key in ("response", "message"):
        if isinstance(body.get(key), dict) and "usage" in body[key]:
            body = body[key]
    for key in keys:
        body = body[key]
    return body


def in_header(answer: requests.Response) -> dict[str, str]:
    """The report's short form."""
    return dict(part.split("=", 1) for part in answer.headers["x-blend"].split("; "))


def events(answer: requests.Response) -> list[Any]:
    """What a stream says, each event or line as JSON."""
    lines = [line.removeprefix(b"data: ") for line in answer.content.split(b"\n")]
    return [json.loads(line) for line in lines if line.startswith(b"{")]
