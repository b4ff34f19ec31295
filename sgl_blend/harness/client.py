"""Requests to a running SGLang server over HTTP, timed from the outside."""

from __future__ import annotations

import ipaddress
import json
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar
from urllib.parse import urlsplit

import requests

from sgl_blend.errors import BlendError

#: seconds that one request may take
TIMEOUT = 1800.0

Item = TypeVar("Item")
Result = TypeVar("Result")


class ServerError(BlendError):
    """A server did not start, does not answer, or answered with an error."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One greedy request's answer. ttft, total: seconds. tokens: of the output. meta: SGLang's
    ``meta_info``."""

    text: str
    tokens: tuple[int, ...]
    meta: Mapping[str, Any]
    ttft: float = 0.0
    total: float = 0.0

    @property
    def blend(self) -> dict[str, Any] | None:
        """What blending did; None from a plain server."""
        return self.meta.get("blend")

    @property
    def logprobs(self) -> tuple[float, ...]:
        """Log-probabilities of the output's tokens, where they were asked for."""
        return tuple(p[0] for p in self.meta.get("output_token_logprobs") or [])


def answer_of(body: Mapping[str, Any], ttft: float = 0.0, total: float = 0.0) -> Answer:
    """From one answer of /generate. Raises :class:`ServerError` for a failure inside a 200."""
    if not isinstance(body, dict) or not {"error", "meta_info"} & body.keys():
        raise ServerError(f"/generate answered as SGLang does not: {str(body)[:200]}")
    if "error" in body:
        raise ServerError(f"/generate failed: {body['error']}")
    meta = body["meta_info"]
    reason = meta.get("finish_reason") or {}
    if reason.get("type") == "abort":
        raise ServerError(f"the server aborted the request: {reason.get('message')}")
    return Answer(
        body.get("text", ""), tuple(body.get("output_ids", ())), meta, ttft=ttft, total=total
    )


def greedy(
    prompt: Sequence[int] | str,
    max_new_tokens: int,
    custom: Mapping[str, Any] | None = None,
    **params: Any,
) -> dict[str, Any]:
    """Body of a greedy /generate request. ``custom``: custom_params; ``params``: more of
    sampling_params."""
    params = {"temperature": 0, "max_new_tokens": max_new_tokens, **params}
    if custom is not None:
        params["custom_params"] = custom
    if isinstance(prompt, str):
        return {"text": prompt, "sampling_params": params}
    return {"input_ids": list(prompt), "sampling_params": params}


def bearer(key: str | None) -> dict[str, str] | None:
    """The header that a server with an API key asks for; None without a key."""
    return {"Authorization": f"Bearer {key}"} if key else None


class Client:
    """Talks to the server at ``url``. Thread-safe. Raises :class:`ServerError`."""

    def __init__(self, url: str, headers: Mapping[str, str] | None = None) -> None:
        self.url = url.rstrip("/")
        self._headers = dict(headers or {})

    def send(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        timeout: float = TIMEOUT,
        stream: bool = False,
        also: Sequence[int] = (),
    ) -> requests.Response:
        """One request; raises unless the status is 200 or in ``also``."""
        try:
            with requests.Session() as session:
                # A proxy that the environment names cannot reach a server of this machine.
                session.trust_env = not _is_here(self.url)
                r = session.request(
                    method,
                    self.url + path,
                    json=body,
                    headers=self._headers,
                    timeout=timeout,
                    stream=stream,
                )
                refused = r.status_code != 200 and r.status_code not in also
                said = r.text[:500] if refused else ""
        except requests.RequestException as e:
            raise ServerError(f"no answer from {self.url}{path}: {e}") from None
        if refused:
            raise ServerError(f"{path} answered {r.status_code}: {said}")
        return r

    def json(self, method: str, path: str, body: Any = None, *, timeout: float = TIMEOUT) -> Any:
        """As ``send``: what the answer says."""
        r = self.send(method, path, body, timeout=timeout)
        try:
            return r.json()
        except ValueError:
            raise ServerError(f"{self.url}{path} answered with no JSON") from None

    def generate(self, body: Mapping[str, Any]) -> Any:
        """POST /generate: one answer's JSON, or a list of them."""
        return self.json("POST", "/generate", body)

    def stream(self, body: Mapping[str, Any]) -> Answer:
        """One request to /generate, streamed; TTFT is the arrival of the first token."""
        start = time.perf_counter()
        ttft, last = 0.0, b""
        with self.send("POST", "/generate", {**body, "stream": True}, stream=True) as r:
            try:
                for line in r.iter_lines():
                    if not line.startswith(b"data: ") or line == b"data: [DONE]":
                        continue
                    ttft = ttft or time.perf_counter() - start
                    last = line[6:]
            except requests.RequestException as e:
                raise ServerError(f"no answer from {self.url}/generate: {e}") from None
        if not last:
            raise ServerError("/generate closed without an answer")
        try:
            answer = json.loads(last)
        except ValueError:
            raise ServerError(f"{self.url}/generate answered with no JSON") from None
        return answer_of(answer, ttft, time.perf_counter() - start)

    def flush(self, wait_s: float = 30.0) -> None:
        """Empty the server's caches; it must be idle, or become so within ``wait_s``."""
        # The route can wait by itself (?timeout=), but looks once a second.
        until = time.monotonic() + wait_s
        while True:
            late = time.monotonic() > until
            r = self.send("POST", "/flush_cache", timeout=60.0, also=() if late else (400,))
            if r.status_code == 200:
                return
            time.sleep(0.02)


def _is_here(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def ask(
    url: str,
    prompt: Sequence[int] | str,
    *,
    max_new_tokens: int = 1,
    custom: Mapping[str, Any] | None = None,
) -> Answer:
    """Stream one greedy request."""
    return Client(url).stream(greedy(prompt, max_new_tokens, custom))


def ask_all(
    url: str, prompts: Sequence[Sequence[int]], concurrency: int, **kwargs: Any
) -> tuple[float, list[Answer]]:
    """Send all prompts, ``concurrency`` at a time; returns (wall seconds, answers in order)."""
    start = time.perf_counter()
    answers = map_threads(partial(ask, url, **kwargs), prompts, concurrency)
    return time.perf_counter() - start, answers


def map_threads(do: Callable[[Item], Result], items: Iterable[Item], threads: int) -> list[Result]:
    """Results in order of ``items``, ``threads`` at a time; the first exception is raised.

    Unlike an executor it does not wait for calls under way when it is interrupted: its threads
    are daemons, so that the process can end.
    """
    items = list(items)
    results: dict[int, Result] = {}
    errors: list[BaseException] = []
    pending, lock = iter(enumerate(items)), threading.Lock()

    def work() -> None:
        while not errors:
            with lock:
                entry = next(pending, None)
            if entry is None:
                return
            i, item = entry
            try:
                results[i] = do(item)
            except BaseException as e:
                errors.append(e)

    workers = [threading.Thread(target=work, daemon=True) for _ in range(threads)]
    try:
        for w in workers:
            w.start()
        for w in workers:
            w.join()
    except BaseException as e:
        errors.append(e)  # what is not begun is not sent any more
        raise
    if errors:
        raise errors[0]
    return [results[i] for i in range(len(items))]
