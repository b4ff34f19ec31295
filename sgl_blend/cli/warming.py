"""Documents through a running server: what ``sgl-blend warm`` does, without its command line."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from sgl_blend.cli.documents import Document, head_of, split_to_fit
from sgl_blend.harness.client import Client, ServerError, bearer, map_threads

#: characters of another document that stand before each one: a passage
COMPANY_CHARS = 1000
#: between that and the document
_BETWEEN = "\n\n"
_BUSY = (429, 503)
_RETRY_S = 0.5


@dataclass
class Summary:
    """prompts: more than ``documents`` where some were too long for one. cached: of ``tokens``,
    those that the server had already. failed: source and reason. blending: whether the server is
    one that blends (None: nothing was computed)."""

    documents: int = 0
    prompts: int = 0
    tokens: int = 0
    cached: int = 0
    seconds: float = 0.0
    failed: list[tuple[str, str]] = field(default_factory=list)
    blending: bool | None = None


class WarmServer:
    """A running server, as far as warming needs it. Raises ServerError; thread-safe.

    limit: longest prompt in tokens that it takes.
    """

    def __init__(
        self,
        url: str,
        api_key: str | None = None,
        timeout_s: float = 600.0,
        cache_salt: str | None = None,
        extra_key: str | None = None,
    ):
        headers = bearer(api_key)
        self._client, self._timeout_s = Client(url, headers), timeout_s
        self._key = {"cache_salt": cache_salt, "extra_key": extra_key}
        self._key = {k: v for k, v in self._key.items() if v is not None}
        longest = self._call("GET", "/server_info").get("max_req_input_len")
        if not isinstance(longest, int):
            longest = self._call("POST", "/tokenize", {"prompt": ""}).get("max_model_len")
        if not isinstance(longest, int) or longest < 2:
            raise ServerError(f"{self._client.url} does not say how long a prompt may be")
        # SGLang's bound is the first length that is refused.
        self.limit = longest - 1

    def count(self, text: str) -> int:
        """Tokens of a prompt."""
        return int(self._call("POST", "/tokenize", {"prompt": text})["count"])

    def compute(self, text: str) -> dict:
        """Prefill a prompt, exactly; returns the answer's ``meta_info``."""
        params = {"max_new_tokens": 0, "temperature": 0, "custom_params": {"blend": False}}
        body = {"text": text, "sampling_params": params, **self._key}
        meta = self._call("POST", "/generate", body)["meta_info"]
        reason = meta.get("finish_reason") or {}
        if reason.get("type") == "abort":
            raise ServerError(f"the server aborted the request: {reason.get('message')}")
        return meta

    def _call(self, method: str, path: str, body: dict | None = None) -> dict:
        until = time.monotonic() + self._timeout_s
        while True:
            # A full queue is no failure: the server says to come again.
            again = time.monotonic() + _RETRY_S < until
            left = max(0.1, until - time.monotonic())
            r = self._client.send(method, path, body, timeout=left, also=_BUSY if again else ())
            if r.status_code in _BUSY:
                time.sleep(_RETRY_S)
                continue
            try:
                answer = r.json()
            except ValueError:
                answer = None
            if not isinstance(answer, dict):
                raise ServerError(f"{path} answered with no JSON object")
            return answer


def in_company(documents: Iterable[Document]) -> Iterator[tuple[Document, str]]:
    """Each document, and what stands before it: the head of the first one, which is computed once
    and is a prefix of all other prompts. The first one gets the head of the second.

    KV of a document that was computed behind another one is off by far less, wherever it is reused,
    than KV of one that was computed alone (docs/fidelity.md, "How sources are made")."""
    first: Document | None = None
    before = ""
    for doc in documents:
        if doc.problem:
            yield doc, ""
        elif first is None:
            first = doc
        else:
            if not before:
                before = head_of(first.text, COMPANY_CHARS) + _BETWEEN
                yield first, head_of(doc.text, COMPANY_CHARS) + _BETWEEN
            yield doc, before
    if first is not None and not before:
        yield first, ""


def warm(
    server: WarmServer,
    documents: Iterable[tuple[Document, str]],
    concurrency: int,
    progress: Callable[[str], None],
) -> Summary:
    """Send all documents, ``concurrency`` at a time, each behind its text (``in_company``). One
    that fails does not stop the others."""
    summary, lock, pending = Summary(), threading.Lock(), iter(documents)
    began = shown = time.monotonic()
    stopped = threading.Event()

    def work(_worker: int) -> None:
        nonlocal shown
        while not stopped.is_set():
            with lock:
                found = next(pending, None)
            if found is None:
                return
            doc, before = found
            problem = doc.problem or _one(server, doc, before, summary, lock)
            with lock:
                summary.documents += 1
                if problem:
                    summary.failed.append((doc.source, problem))
                if time.monotonic() - shown >= 0.5:
                    shown = time.monotonic()
                    progress(
                        f"{summary.documents} documents, {summary.tokens} tokens, "
                        f"{len(summary.failed)} failed"
                    )

    try:
        map_threads(work, range(concurrency), concurrency)
    finally:
        # After an interrupt the workers end with the request they are at.
        stopped.set()
    summary.seconds = time.monotonic() - began
    return summary


def _one(
    server: WarmServer, doc: Document, before: str, summary: Summary, lock: threading.Lock
) -> str:
    """Compute one document behind a text; returns why it failed, or nothing."""
    try:
        if before and 2 * server.count(before) > server.limit:
            before = ""
        for part in split_to_fit(doc.text, server.limit, lambda text: server.count(before + text)):
            meta = server.compute(before + part)
            with lock:
                summary.prompts += 1
                summary.tokens += int(meta["prompt_tokens"])
                summary.cached += int(meta.get("cached_tokens") or 0)
                summary.blending = "blend" in meta
    except ServerError as e:
        return str(e)
    except (KeyError, TypeError, ValueError) as e:
        return f"an answer that is not SGLang's: {e!r}"
    return ""
