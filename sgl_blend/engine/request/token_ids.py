"""Token ids that a request brings along: none may be outside the model's vocabulary.

An id outside it indexes past the embedding's rows: on a CPU that ends the server, on a GPU it
poisons the device's context. SGLang 0.5.23 passes it on.
"""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import Any

from sgl_blend.errors import RequestError


def check_token_ids(input_ids: Any, vocab_size: int) -> None:
    """Raise :class:`RequestError` unless ``input_ids`` is a flat sequence of ids below
    ``vocab_size``; None, where a request has none, passes.

    vocab_size: rows of the checkpoint's embedding. The tokenizer may know fewer ids; the rows
    behind them exist and are harmless. SGLang pads its own table further; no token has those rows.
    """
    if input_ids is None:
        return
    if hasattr(input_ids, "tolist"):  # an array or a tensor, from a program
        input_ids = input_ids.tolist()
    if not isinstance(input_ids, list | tuple):
        raise RequestError(
            f"input_ids is a {type(input_ids).__name__}: expected a flat list of token ids"
        )
    if not input_ids:
        return
    if any(not _integral(kind) for kind in set(map(type, input_ids))):
        at = next(i for i, x in enumerate(input_ids) if not _integral(type(x)))
        raise RequestError(
            f"input_ids[{at}] is {_shown(input_ids[at])}: expected a token id, an integer"
        )
    if min(input_ids) < 0 or max(input_ids) >= vocab_size:
        at = _first_outside(input_ids, vocab_size)
        raise RequestError(
            f"input_ids[{at}] is {_shown(input_ids[at])}: the model's token ids are 0 to "
            f"{vocab_size - 1}"
        )


def _integral(kind: type) -> bool:
    return kind is int or (kind is not bool and issubclass(kind, numbers.Integral))


def _first_outside(ids: Sequence[int], vocab_size: int) -> int:
    return next(i for i, x in enumerate(ids) if not 0 <= x < vocab_size)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
