"""What the attention of a blend prefill is asked for: rows, the KV pool, tokens on their way in.

Types alone, below ``attention.py``, ``attention_cuda.py`` and ``scores.py``, which share them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from sgl_blend.ops import AnyRope


class AttentionSpec(NamedTuple):
    """What a layer's attention needs beside q, k and v.

    window: sliding window in tokens, a row sees keys at positions >= its own - window (-1: none).
    logit_cap: tanh soft cap (0: none). sinks: [Hq], a further logit of every row for each of this
    rank's query heads, which takes its share of the softmax and has no value (None: none). k_scale,
    v_scale: what the pool's K and V are multiplied by (fp8 pools hold K / k_scale).
    """

    layer: int
    scale: float
    window: int = -1
    logit_cap: float = 0.0
    sinks: torch.Tensor | None = None
    k_scale: float = 1.0
    v_scale: float = 1.0

    @property
    def pool_scale(self) -> float:
        """What multiplies q k where k is as the pool holds it."""
        return self.scale * self.k_scale

    def value(self, out: torch.Tensor) -> torch.Tensor:
        """Attention's ``out`` over V as the pool holds it, as it is meant."""
        return out if self.v_scale == 1.0 else out * self.v_scale


class Shift(NamedTuple):
    """What is added to one layer's KV of tokens on their way in (``correction.py``).

    k [documents, Hk, Dr], v [documents, Hk, Dc]: fp32, for the parts that ``PoolView.moved`` names,
    in the pool's unit; k as at position 0. document: int32 [n], whose shift each token gets; -1:
    none.
    """

    k: torch.Tensor
    v: torch.Tensor
    document: torch.Tensor


class Incoming(Protocol):
    """Tokens on their way into a request's slots: a ``KvCopy``, or loaded chunks."""

    def run(
        self,
        pool: PoolView,
        layer: int,
        shift: Shift | None = None,
        runs: torch.Tensor | None = None,
    ) -> None:
        """Write ``layer``'s KV, rotated to the new positions where it is rotated, and shifted, into
        the pool; not that of tokens that run themselves (``runs`` uint8 [n], 1)."""


class PoolView(Protocol):
    """The KV pool, layer by layer."""

    def k(self, layer: int) -> torch.Tensor:
        """[num_slots, Hk, D]"""

    def v(self, layer: int) -> torch.Tensor:
        """[num_slots, Hk, Dv]"""

    def moved(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """What is rotated when a token moves [num_slots, Hk, Dr], and what is copied as it is
        [num_slots, Hk, Dc]: views of the pool. (K, V), or the two parts of a latent cache's
        vectors."""

    def rope(self, layer: int) -> AnyRope | None:
        """The layer's rotation; None for a layer without positions in its keys."""


class RowAttention(Protocol):
    """What takes the place of the model's attention: ``BatchAttention``, ``QuestionAttention``, and
    the gate's ``SelfAttention``. scratch: the rows leave no KV in the pool."""

    scratch: bool

    def bring_in(self, layer: int) -> None:
        """Write the reused tokens' KV of ``layer`` into the pool; what the rows have computed, and
        may have written already, stays."""

    def __call__(
        self, spec: AttentionSpec, q: torch.Tensor, k: torch.Tensor | None, v: torch.Tensor | None
    ) -> torch.Tensor:
        """q [R, Hq, D], k [R, Hk, D], v [R, Hk, Dv] -> [R, Hq, Dv]. k, v: None where a layer reads
        another one's KV."""


@dataclass(frozen=True)
class RowSegment:
    """One request's rows in the current pass: rows [first, last), their positions (int64,
    ascending), the slots of its tokens at positions 0.. (int64 [S]), and where each row's document
    begins (int64; None: it is not scored)."""

    first: int
    last: int
    positions: torch.Tensor
    kv_slots: torch.Tensor
    starts: torch.Tensor | None = None
