"""Prompts of parts, whose boundaries reach the server exactly.

A server finds documents by their content, wherever a prompt is cut. A program that has them apart
can say where they lie: each is tokenized by itself, so that it has the same tokens in every prompt,
and its offsets go along. A body made here goes to ``/generate`` or, by any OpenAI client, to
``/v1/completions``::

    p = chat(tokenizer, [{"role": "user", "content": [Chunk(doc1), Chunk(doc2), question]}])
    client.completions.create(model="default", **p.openai(), max_tokens=64)

``tokenizer`` is transformers' ``PreTrainedTokenizerBase`` of the model that is served. One that
puts a space before each text (older SentencePiece ones) puts it before each part.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sgl_blend.errors import PromptError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Chunk(str):
    """A text that other prompts hold too: a document, an example, a tool's result."""

    __slots__ = ()


@dataclass(frozen=True)
class Prompt:
    """ids: token ids. boundaries: offsets into them where a chunk begins or ends, ascending."""

    ids: tuple[int, ...]
    boundaries: tuple[int, ...]

    def params(self, **options: Any) -> dict[str, Any]:
        """``custom_params``. options: of the request, without ``blend_`` (``ratio=0.2``); ``blend``
        keeps its name."""
        given = {k if k == "blend" else f"blend_{k}": v for k, v in options.items()}
        return {**given, "blend_boundaries": list(self.boundaries)}

    def generate(self, sampling: Mapping[str, Any] | None = None, **options: Any) -> dict[str, Any]:
        """A body for ``/generate``. sampling: ``sampling_params``."""
        params = {**(sampling or {}), "custom_params": self.params(**options)}
        return {"input_ids": list(self.ids), "sampling_params": params}

    def openai(self, **options: Any) -> dict[str, Any]:
        """Arguments for ``completions.create`` of OpenAI's client."""
        body = {"custom_params": self.params(**options)}
        return {"prompt": list(self.ids), "extra_body": body}


def prompt(tokenizer: PreTrainedTokenizerBase, parts: Sequence[str]) -> Prompt:
    """A prompt without roles: what the tokenizer puts before a text, and ``parts``."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    lead = next((i for i in range(len(full)) if full[i : i + len(plain)] == plain), 0)
    return _joined(tokenizer, list(full[:lead]), parts)


def chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = True,
    **template: Any,
) -> Prompt:
    """A prompt by the tokenizer's chat template. A message's ``content`` is a text, a
    :class:`Chunk`, or a list of them, which are put together as they are. template: further
    arguments of ``apply_chat_template``.

    Raises :class:`PromptError` where the template does not pass on each chunk once, in order.
    """
    chunks: list[Chunk] = []

    def with_places(content: Any) -> Any:
        parts = [content] if isinstance(content, str) else content
        if not isinstance(parts, list | tuple) or not all(isinstance(p, str) for p in parts):
            return content
        out = ""
        for part in parts:
            if isinstance(part, Chunk):
                out += _place(len(chunks))
                chunks.append(part)
            else:
                out += part
        return out

    placed = [{**m, "content": with_places(m.get("content"))} for m in messages]
    text = tokenizer.apply_chat_template(
        placed, tokenize=False, add_generation_prompt=add_generation_prompt, **template
    )
    pieces = _PLACE.split(str(text))
    seen = [int(number) for number in pieces[1::2]]
    if seen != list(range(len(chunks))):
        raise PromptError(
            f"the chat template passes on the chunks {seen} of {len(chunks)}: each is needed once, "
            "in order. Put them into messages that the template shows as they are"
        )
    pieces[1::2] = chunks
    return _joined(tokenizer, [], pieces)


#: stands for a chunk while the template is applied: private-use characters around its number
_PLACE = re.compile("\ue000([0-9]+)\ue001")


def _place(number: int) -> str:
    return f"\ue000{number}\ue001"


def _joined(tokenizer: PreTrainedTokenizerBase, ids: list[int], parts: Sequence[str]) -> Prompt:
    boundaries: set[int] = set()
    for part in parts:
        tokens = tokenizer(str(part), add_special_tokens=False)["input_ids"] if part else []
        if isinstance(part, Chunk) and tokens:
            boundaries |= {len(ids), len(ids) + len(tokens)}
        ids.extend(tokens)
    return Prompt(tuple(ids), tuple(sorted(boundaries)))
