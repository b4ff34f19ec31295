"""Strong boundaries: tokens behind which a chunk always ends."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import numpy as np

from sgl_blend.config import BlendConfig

if TYPE_CHECKING:
    from sglang.srt.server_args import ServerArgs
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


def load_tokenizer(server_args: ServerArgs) -> PreTrainedTokenizerBase | None:
    """The server's Hugging Face tokenizer; None under ``--skip-tokenizer-init``."""
    from sglang.srt.arg_groups.overrides import resolving_view
    from sglang.srt.utils.hf_transformers_utils import get_tokenizer

    view = resolving_view(server_args)
    if view.skip_tokenizer_init:
        return None
    return get_tokenizer(
        view.tokenizer_path or view.model_path,
        tokenizer_mode=view.tokenizer_mode,
        trust_remote_code=view.trust_remote_code,
        tokenizer_revision=view.revision,
    )


def strong_tokens(tokenizer: PreTrainedTokenizerBase | None, config: BlendConfig) -> np.ndarray:
    """Token ids (int64, ascending): special tokens, and tokens whose text has a separator in it.

    Without a tokenizer (None) there are none; content-defined chunking needs none.
    """
    if tokenizer is None:
        return np.zeros(0, dtype=np.int64)
    return strong_tokens_of(tokenizer, config.separators)


def strong_tokens_of(tokenizer: PreTrainedTokenizerBase, separators: tuple[str, ...]) -> np.ndarray:
    """As above, for a Hugging Face tokenizer."""
    strong = set(getattr(tokenizer, "all_special_ids", []))
    strong |= {i for i, t in getattr(tokenizer, "added_tokens_decoder", {}).items() if t.special}
    found = dict.fromkeys(separators, 0)
    if separators:
        ids = list(range(len(tokenizer)))
        for i, text in zip(ids, tokenizer.batch_decode([[i] for i in ids]), strict=True):
            for sep in separators:
                if sep in text:
                    found[sep] += 1
                    strong.add(i)
    for sep, n in found.items():
        if n == 0:
            logger.warning(
                "sgl-blend: no token contains the separator %r, so it cuts nothing; chunks are "
                "found by content all the same",
                sep,
            )
    return np.array(sorted(strong), dtype=np.int64)
