"""Prompts to token ids, as the server would make them, with stated boundaries where asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from sgl_blend.errors import ConfigError
from sgl_blend.eval.probes import Prompt

Boundaries = Literal["none", "question", "documents"]
BOUNDARIES: tuple[Boundaries, ...] = get_args(Boundaries)


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids, and the token offsets to state as ``blend_boundaries`` (empty: state none)."""

    ids: tuple[int, ...]
    boundaries: tuple[int, ...] = ()


class Encoder:
    """A model's own tokenizer.

    boundaries: state none, where the question begins, or where each document does as well.
    chat: wrap the prompt as a user message by the tokenizer's chat template; None: where it has
    one. The whole text is tokenized at once, as what a person sends is. Raises ``ConfigError``.
    """

    def __init__(
        self, tokenizer: str | Path, *, boundaries: Boundaries = "none", chat: bool | None = False
    ) -> None:
        from transformers import AutoTokenizer

        if boundaries not in BOUNDARIES:
            raise ConfigError(f"boundaries is {boundaries!r}; take one of {', '.join(BOUNDARIES)}")
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(tokenizer, local_files_only=True)
        except (OSError, ValueError) as e:
            raise ConfigError(
                f"no tokenizer at {str(tokenizer)!r}: {str(e).splitlines()[0]}"
            ) from None
        if chat is None:
            chat = bool(self._tokenizer.chat_template)
        if chat and not self._tokenizer.chat_template:
            raise ConfigError(f"the tokenizer at {str(tokenizer)!r} has no chat template")
        if boundaries != "none" and not self._tokenizer.is_fast:
            raise ConfigError(
                f"the tokenizer at {str(tokenizer)!r} is a slow one, which cannot say where "
                "tokens lie in the text; state no boundaries"
            )
        self._boundaries = boundaries
        self.chat = chat

    def encode(self, prompt: Prompt) -> Encoded:
        text, shift = prompt.text, 0
        if self.chat:
            said = [{"role": "system", "content": prompt.system}] if prompt.system else []
            text = self._tokenizer.apply_chat_template(
                [*said, {"role": "user", "content": prompt.text}],
                tokenize=False,
                add_generation_prompt=True,
            )
            # A template may strip the message; its beginning is never white space here.
            shift = text.find(prompt.text.rstrip())
        elif prompt.system:
            shift = len(prompt.system) + len(prompt.joiner)
            text = prompt.system + prompt.joiner + text
        if self._boundaries == "none":
            return Encoded(tuple(self._ids(text)["input_ids"]))
        if shift < 0:
            raise ConfigError("the chat template rewrites the prompt; state no boundaries")
        starts = prompt.starts[-1:] if self._boundaries == "question" else prompt.starts
        out = self._ids(text, return_offsets_mapping=True)
        at = _places([s + shift for s in starts], out["offset_mapping"])
        return Encoded(tuple(out["input_ids"]), at)

    @property
    def vocabulary(self) -> int:
        """How many tokens there are; the model may have room for more."""
        return len(self._tokenizer)

    def length(self, prompt: Prompt) -> int:
        """How many tokens ``encode`` gives."""
        return len(self.encode(prompt).ids)

    def _ids(self, text: str, **kw):
        # A chat template writes special tokens itself.
        return self._tokenizer(text, add_special_tokens=not self.chat, verbose=False, **kw)


def _places(starts: list[int], offsets: list[tuple[int, int]]) -> tuple[int, ...]:
    """For each character offset the first token that lies at or behind it, ascending, without
    repeats. Special tokens lie nowhere."""
    out: list[int] = []
    token = 0
    for start in starts:
        while token < len(offsets):
            left, right = offsets[token]
            if right > left and left >= start:
                break
            token += 1
        if not out or token > out[-1]:
            out.append(token)
    return tuple(out)
