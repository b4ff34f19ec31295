"""How much a few rows attend to each of many keys, where the softmax's log-sum-exp is known."""

from __future__ import annotations

from typing import NamedTuple

import torch

from sgl_blend.errors import KernelError
from sgl_blend.ops import checks, cuda, reference
from sgl_blend.ops.checks import require
from sgl_blend.ops.cuda_build import kernels


def attention_mass(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    kv_slots: torch.Tensor,
    q_pos: torch.Tensor,
    lse: torch.Tensor,
    row_weights: torch.Tensor,
    *,
    scale: float,
    window: int = -1,
    logit_cap: float = 0.0,
    kv_pos0: int = 0,
    key_pos: torch.Tensor | None = None,
    values: torch.Tensor | None = None,
) -> torch.Tensor:
    """fp32 [S]: softmax probability of each pool key, summed over heads and, by ``row_weights``
    (fp32 [R]), over rows; ``row_attention_with_mass``'s, in a pass of its own over K.

    q [R, Hq, D], k_cache [num_slots, Hk, D], kv_slots and q_pos as in ``row_attention``. lse: fp32
    [R, Hq], natural logarithm of the sum of exp(score) over all that a row sees, keys outside the
    pool and sinks included. key_pos: int64 [S], the keys' positions; None: ``kv_pos0 + j``. values:
    the pool's V [num_slots, Hk, Dv], where a probability counts as much as the key's value is long,
    head by head. Plain torch on the CPU.

    Raises:
        KernelError: arguments that do not fit.
    """
    checks.floats("q", q, 3)
    checks.cached("k_cache", k_cache, 3, q.device)
    slots = checks.index("kv_slots", kv_slots, q.device)
    pos = checks.index("q_pos", q_pos, q.device)
    rows, heads, head = q.shape
    require(head == k_cache.shape[2], lambda: f"q has head size {head}, k_cache {k_cache.shape[2]}")
    require(
        k_cache.shape[1] > 0 and heads % k_cache.shape[1] == 0,
        lambda: f"{heads} query heads are no multiple of {k_cache.shape[1]} key heads",
    )
    require(pos.shape[0] == rows, lambda: f"q has {rows} rows, q_pos {pos.shape[0]}")
    for name, tensor, shape in (("lse", lse, (rows, heads)), ("row_weights", row_weights, (rows,))):
        checks.floats(name, tensor, len(shape), q.device)
        if tensor.shape != shape:
            raise KernelError(f"{name} is {list(tensor.shape)}; expected {list(shape)}")
    if key_pos is not None:
        key_pos = checks.index("key_pos", key_pos, q.device)
        if key_pos.shape != slots.shape:
            raise KernelError(f"{key_pos.shape[0]} key_pos, {slots.shape[0]} slots")
    if values is not None:
        checks.pool(k_cache, values, ("k_cache", "values"))
    lse, weights = lse.float().contiguous(), row_weights.float().contiguous()
    on_device = kernels(q.device, "attention_mass")
    if on_device is not None and slots.shape[0] and _sums(q, k_cache, values):
        return cuda.attention_mass(
            on_device, q, k_cache, slots, pos, lse, weights,
            scale=scale, window=window, logit_cap=logit_cap, kv_pos0=kv_pos0, key_pos=key_pos,
            values=values,
        )  # fmt: skip
    norms = None if values is None else values[slots].float().norm(dim=2)
    checks.in_range("kv_slots", slots, k_cache.shape[0])
    if key_pos is None:
        key_pos = torch.arange(kv_pos0, kv_pos0 + slots.shape[0], device=q.device)
    return reference.attention_mass(
        q, k_cache[slots], key_pos, pos, lse, weights,
        scale=scale, window=window, logit_cap=logit_cap, norms=norms,
    )  # fmt: skip


def _sums(q: torch.Tensor, k_cache: torch.Tensor, values: torch.Tensor | None) -> bool:
    return cuda.sums_mass(q, k_cache) and (values is None or cuda.in_rows(values))


class Window(NamedTuple):
    """A sliding window of ``size``, and where the rows that look through it (int64 [R]) and the
    keys (int64 [S]) stand."""

    size: int
    q_pos: torch.Tensor
    key_pos: torch.Tensor


class MassSum:
    """``attention_mass`` of one request's cached keys, added up over layers, in one launch a layer.

    slots: int64 [S]. weights: fp32 [R]. by_value: ``by_value`` of ``row_attention_with_mass``.
    window: through which all these layers look; None: every row sees every key.
    """

    def __init__(
        self,
        slots: torch.Tensor,
        weights: torch.Tensor,
        by_value: bool,
        window: Window | None = None,
    ) -> None:
        self._slots, self._weights, self._by_value = slots.contiguous(), weights, by_value
        if window is None:
            behind = torch.full_like(weights, slots.shape[0], dtype=torch.int64)
            self._size, self._q_pos, self._key_pos = -1, behind, None
        else:
            self._size, self._q_pos, self._key_pos = window
        self._all: torch.Tensor | None = None
        self._late: torch.Tensor | None = None

    def serves(self, q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor) -> bool:
        """Is there a kernel for these queries [R, Hq, D] and this pool? There is none on the
        CPU."""
        return kernels(q.device, "attention_mass") is not None and _sums(q, k_cache, v_cache)

    def add(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        lse: torch.Tensor,
        *,
        scale: float,
        logit_cap: float,
        v_scale: float,
        late: bool,
    ) -> None:
        """Adds a layer. q [R, Hq, D]; lse: fp32 [R, Hq], dense, of all that a row sees. v_scale:
        what the pool's V is multiplied by. late: it counts for ``late``, too.

        Raises:
            KernelError: arguments that do not fit, or that no kernel serves (``serves``).
        """
        if self._all is None:
            self._all = self._zeros(k_cache)
        if late and self._late is None:
            self._late = self._zeros(k_cache)
        if not self._slots.shape[0]:
            return
        cuda.add_mass(
            kernels(q.device, "attention_mass"), q, k_cache,
            v_cache if self._by_value else None, self._slots, self._q_pos, lse, self._weights,
            self._all, self._late if late else None,
            scale=scale, window=self._size, logit_cap=logit_cap, key_pos=self._key_pos,
            value_unit=v_scale,
        )  # fmt: skip

    def _zeros(self, k_cache: torch.Tensor) -> torch.Tensor:
        shape = (k_cache.shape[1], self._slots.shape[0])
        return torch.zeros(shape, dtype=torch.float32, device=k_cache.device)

    def total(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """fp32 [S] each: of all layers, and of those that were ``late``, never by value; None where
        there were none."""
        every, late = (None if x is None else x.sum(dim=0) for x in (self._all, self._late))
        return every, late
