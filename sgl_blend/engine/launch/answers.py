"""Reports in the bodies of answers, whatever route wrote them.

SGLang's response classes have no room for a report, so it is put into the JSON that they became
(SGLang 0.5.23): beside ``usage``, or at the top where there is none, and its counts into the
details of ``usage``. What has ``meta_info`` carries its reports there (``request/report.py``).
"""

from __future__ import annotations

import re
from typing import Any

import orjson

from sgl_blend.engine.request.exchange import token_details, total

KEY = "blend"
#: in a line of a stream: usage, the end of a choice (OpenAI), or of the answer (Ollama)
_LATE = re.compile(rb'"usage":\s*\{|"finish_reason":\s*"|"done":\s*true')


def with_report(body: bytes, reports: list[dict[str, Any]]) -> bytes:
    """``body``, JSON of a whole answer, with its report; as it is where it is no JSON object."""
    try:
        answer = orjson.loads(body)
    except orjson.JSONDecodeError:
        return body
    if not isinstance(answer, dict) or "meta_info" in answer or "predictions" in answer:
        return body
    where = _holder(answer)
    where[KEY] = total(reports)
    usage = where.get("usage")
    if isinstance(usage, dict):
        # The Responses and Messages APIs count input tokens, the others prompt tokens.
        key = "input_tokens_details" if "input_tokens" in usage else "prompt_tokens_details"
        usage[key] = {**(usage.get(key) or {}), **token_details(reports)}
    return orjson.dumps(answer, option=orjson.OPT_NON_STR_KEYS)


def with_report_at_the_end(chunk: bytes, reports: list[dict[str, Any]]) -> bytes:
    """A part of a stream, one or more whole lines of events or of JSON, with the report in those
    that state usage or an end. Other parts are not looked into."""
    if not reports or not _LATE.search(chunk):
        return chunk
    lines = chunk.split(b"\n")
    for i, line in enumerate(lines):
        if _LATE.search(line):
            head = b"data: " if line.startswith(b"data: ") else b""
            lines[i] = head + with_report(line[len(head) :], reports)
    return b"\n".join(lines)


def _holder(answer: dict[str, Any]) -> dict[str, Any]:
    """What states the usage: the answer, or what an event of a stream carries (``response``,
    ``message``)."""
    for key in ("response", "message"):
        inner = answer.get(key)
        if isinstance(inner, dict) and isinstance(inner.get("usage"), dict):
            return inner
    return answer
