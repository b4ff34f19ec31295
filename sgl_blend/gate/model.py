"""What the gate asks of a model. ``engine/gate/model.py`` implements it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Ask:
    """One prompt to prefill.

    policy, ratio: blend by them; ``policy=None`` is exact prefill. pieces: lengths of the prefill
    pieces but the last. source: reuse this run's KV of the very same prompt, all of it before
    ``suffix`` (nothing is looked up, nothing is moved); ``recompute`` are then the positions that
    are recomputed, or None to let the policy choose. moves: (from, to, tokens) of each part of the
    source that is reused instead, at another place. alone: each token attends to itself alone
    (exact prefill only). keep: leave the KV where later prompts can reuse it, as a served request
    does.
    """

    tokens: Sequence[int]
    policy: str | None = None
    ratio: float = 0.0
    pieces: Sequence[int] = ()
    source: Ran | None = None
    suffix: int = 0
    recompute: tuple[int, ...] | None = None
    moves: tuple[tuple[int, int, int], ...] = ()
    alone: bool = False
    keep: bool = False

    def cut(self, piece: int) -> Ask:
        """The same prompt in pieces of ``piece`` tokens."""
        return replace(self, pieces=(piece,) * ((len(self.tokens) - 1) // piece))


class Ran(Protocol):
    """A prefilled prompt. Its KV stays in the pool until ``GateModel.release``.

    logits: fp32 [vocab], of the last row. reused: int64, the positions that were reused, those
    recomputed included.
    """

    logits: torch.Tensor
    reused: torch.Tensor


class Sizes(NamedTuple):
    """What probes must fit. room: pool slots that are free. requests: that may be held at once.
    positions: what rotation tables cover. page: tokens a page. ids: token ids that mean nothing
    special, [first, last). piece: tokens that the server prefills at once, at the most."""

    room: int
    requests: int
    positions: int
    page: int
    ids: tuple[int, int]
    piece: int


class GateModel(Protocol):
    """All calls are made by every tensor-parallel rank, in the same order."""

    num_layers: int
    #: unit roundoff of the coarser of the model's and the pool's dtype, fp8 left out
    roundoff: float
    #: unit roundoff of a pool of fp8; 0 for any other
    quantum: float
    #: a policy that recomputes everything at ratio 1.0: the configured one, where it does
    full_policy: str

    def sizes(self) -> Sizes: ...

    def run(self, *asks: Ask) -> Sequence[Ran]:
        """Prefill the prompts in one batch (in several, where they name pieces)."""

    def kv(self, ran: Ran, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of the prompt's tokens at ``layer``, [tokens, heads, dim]; this rank's heads."""

    def release(self, *ran: Ran) -> None:
        """Give the runs' slots back."""

    def flush(self) -> None:
        """Forget all that was kept. Every run must have been released."""

    def worst(self, values: Sequence[float]) -> list[float]:
        """Each value's sum over the ranks: what only one rank sees must fail on all of them."""

    def agree(self, values: Sequence[float]) -> list[float]:
        """Rank 0's values on every rank."""
