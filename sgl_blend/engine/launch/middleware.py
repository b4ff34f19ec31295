"""The way in and out of every HTTP route: an ASGI middleware of SGLang's application.

In: the header ``x-blend``, and ``custom_params`` in bodies of routes whose classes drop them. Out:
the report, in a header and in the body. A malformed request is a 400 on each route, in the form of
that route's errors; the head of an answer is held back until its first byte, so that this holds for
streams too. The application, its exception handlers and its routes' paths are SGLang's (0.5.23,
``entrypoints/http_server.py``).
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

import orjson

from sgl_blend import attach
from sgl_blend.engine.launch.answers import with_report, with_report_at_the_end
from sgl_blend.engine.request import header
from sgl_blend.engine.request.exchange import CURRENT, NAME, Exchange, blend_keys, total
from sgl_blend.engine.request.options import check_options, parse_options
from sgl_blend.errors import RequestError

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

#: routes whose request classes have no ``custom_params``
DROPPING = frozenset(
    {
        "/v1/responses",
        "/v1/messages",
        "/v1/score",
        "/v1/decisions",
        "/v1/systemone",
        "/v1/rerank",
        os.environ.get("SGLANG_OLLAMA_CHAT_ROUTE", "/api/chat"),
        os.environ.get("SGLANG_OLLAMA_GENERATE_ROUTE", "/api/generate"),
    }
)


class BlendMiddleware:
    """See the module's docstring. app: the ASGI application inside it."""

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self.app = app

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] not in ("POST", "PUT"):
            await self.app(scope, receive, send)
            return
        exchange = Exchange()
        try:
            exchange.header = header.header_options(scope["headers"])
            _check(exchange.header, exchange)
            if _path(scope) in DROPPING:
                body, receive = await _read(receive)
                said, body = _dropped_params(body)
                _check(said, exchange)
                exchange.body = said
                receive = _once_more(body, receive)
        except RequestError as e:
            await _refuse(scope, receive, send, e)
            return
        answer = Answer(exchange, send)
        before = CURRENT.set(exchange)
        try:
            await self.app(scope, receive, answer.send)
        except RequestError as e:
            if answer.begun:
                raise
            exchange.refused = e
        finally:
            CURRENT.reset(before)
        if exchange.refused is not None and not answer.begun:
            await _refuse(scope, receive, send, exchange.refused)


class Answer:
    """Sends what the application sends, its head with the first part of its body."""

    def __init__(self, exchange: Exchange, send: Send) -> None:
        self._exchange = exchange
        self._send = send
        self._head: Message = {}
        #: parts of a body of JSON, which is changed as a whole
        self._parts: list[bytes] = []
        self.begun = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._head = message
        elif message["type"] == "http.response.body" and self._head:
            await self._body(message)
        elif not self._refused():
            await self._begin()
            await self._send(message)

    def _refused(self) -> bool:
        """Is the application's answer to be replaced by a 400? Not where it is one."""
        refused = self._exchange.refused is not None and not self.begun
        return refused and not 400 <= self._head.get("status", 0) < 500

    async def _body(self, message: Message) -> None:
        if self._refused():
            return
        reports, body = self._exchange.reports, message.get("body", b"")
        if self._head["status"] != 200 or not reports and self.begun:
            pass
        elif self._kind().startswith("application/json"):
            self._parts.append(body)
            if message.get("more_body"):
                return
            body = b"".join(self._parts)
            if reports:
                body = with_report(body, reports)
                self._replace("content-length", str(len(body)))
        else:
            body = with_report_at_the_end(body, reports)
        await self._begin()
        await self._send({**message, "body": body})

    async def _begin(self) -> None:
        if self.begun or not self._head:
            return
        self.begun = True
        if self._exchange.reports:
            self._replace(NAME, header.short(total(self._exchange.reports)))
        await self._send(self._head)

    def _kind(self) -> str:
        kinds = [v for k, v in self._head["headers"] if k.lower() == b"content-type"]
        return kinds[0].decode("latin-1") if kinds else ""

    def _replace(self, name: str, value: str) -> None:
        key = name.encode("latin-1")
        rest = [(k, v) for k, v in self._head["headers"] if k.lower() != key]
        self._head["headers"] = [*rest, (key, value.encode("latin-1"))]


def _path(scope: MutableMapping[str, Any]) -> str:
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))


def _check(said: Mapping[str, Any], exchange: Exchange) -> None:
    """Check ``said``, by keys of ``custom_params``, as far as that goes without a prompt. Raises
    :class:`RequestError`."""
    if not said:
        return
    from sglang.srt.entrypoints import http_server

    server_args = http_server.get_global_state().tokenizer_manager.server_args
    try:
        check_options(parse_options(said, None), attach.CONFIG.get(server_args))
    except RequestError as e:
        raise (exchange.renamed(e) if said is exchange.header else e) from None


async def _read(receive: Receive) -> tuple[bytes, Receive]:
    """A request's body, and what gives the messages that follow."""
    parts: list[bytes] = []
    while True:
        message = await receive()
        if message["type"] != "http.request":  # the client has gone
            return b"".join(parts), _once_more(message, receive)
        parts.append(message.get("body", b""))
        if not message.get("more_body"):
            return b"".join(parts), receive


def _once_more(first: bytes | Message, receive: Receive) -> Receive:
    """Gives ``first``, a whole body or a message, and then what ``receive`` gives."""
    message = {"type": "http.request", "body": first} if isinstance(first, bytes) else first
    waiting = [message]

    async def next_message() -> Message:
        return waiting.pop() if waiting else await receive()

    return next_message


def _dropped_params(body: bytes) -> tuple[dict[str, Any], bytes]:
    """The blend keys of ``custom_params`` in a JSON body, and the body without them: some classes
    refuse what they do not know. What else is wrong with it is SGLang's to say. Raises
    :class:`RequestError`."""
    if b'"custom_params"' not in body:
        return {}, body
    try:
        request = orjson.loads(body)
    except orjson.JSONDecodeError:
        return {}, body
    said = request.get("custom_params") if isinstance(request, dict) else None
    parse_options(said, None)
    ours = blend_keys(said or {})
    if said and ours:
        others = {k: v for k, v in said.items() if k not in ours}
        del request["custom_params"]
        if others:
            request["custom_params"] = others
        body = orjson.dumps(request)
    return ours, body


async def _refuse(
    scope: MutableMapping[str, Any], receive: Receive, send: Send, error: RequestError
) -> None:
    """A 400 as SGLang's application writes it for the route."""
    from fastapi import HTTPException, Request

    handler = scope["app"].exception_handlers[HTTPException]
    response = await handler(Request(scope, receive), HTTPException(400, str(error)))
    await response(scope, receive, send)
