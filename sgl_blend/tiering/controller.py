"""The loading controller: load a chunk or recompute it, and how much recompute a load pays for.

CacheBlend (arXiv:2405.16444), section 5.1. With ``Prefill(n)`` the time of a full prefill of n
tokens and ``T_load`` the time to bring the chunks' KV in, both measured, layer by layer loading
runs while earlier layers are blended. Recompute up to ``T_load`` costs nothing, so the ratio is
the smallest whose compute hides the load, and never under the configured quality floor::

    T_blend(r) = (c + r (L - c)) / L * Prefill(n)       c: layers up to the check layer, in full
    r*         = (T_load * L / Prefill(n) - c) / (L - c)
    r          = min(1, max(floor, r*))

A selection that needs the first ``a`` layers' KV before the blend begins (a question pass) leaves
only the rest of the load to hide: ``T_load (1 - a)`` takes the place of ``T_load`` above.

Pure: measurements go in, decisions come out; no clock, no I/O. Times in seconds, sizes in bytes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, Literal, NamedTuple, TypeVar

import numpy as np

from sgl_blend.errors import ConfigError, unknown_name

Speed = TypeVar("Speed", "TierSpeed", "PrefillSpeed")


@dataclass(frozen=True)
class TierSpeed:
    """latency: of one batch of loads. bandwidth: bytes a second once it flows."""

    latency: float
    bandwidth: float

    def load_time(self, nbytes: int) -> float:
        return self.latency + nbytes / self.bandwidth if nbytes else 0.0


@dataclass(frozen=True)
class PrefillSpeed:
    """Full prefill of n tokens takes ``fixed + linear n + quadratic n^2``."""

    fixed: float
    linear: float
    quadratic: float = 0.0

    def time(self, n_tokens: int) -> float:
        return self.fixed + n_tokens * (self.linear + n_tokens * self.quadratic)


class _Meter(Generic[Speed]):
    """A speed, fitted to the latest ``window`` observations of how long an amount took."""

    def __init__(self, prior: Speed, window: int) -> None:
        self._prior = prior
        self._seen: deque[tuple[float, float]] = deque(maxlen=window)

    def observe(self, amount: int, seconds: float) -> None:
        if amount > 0 and seconds > 0:
            self._seen.append((float(amount), float(seconds)))

    def _columns(self) -> tuple[np.ndarray, np.ndarray]:
        """float64 [observations] each: amounts, seconds."""
        amounts, seconds = zip(*self._seen, strict=True)
        return np.array(amounts), np.array(seconds)


class TierMeter(_Meter[TierSpeed]):
    """Bandwidth and latency of a tier from its own loads, in bytes, the latest of them weighing
    most: fits ``seconds = latency + nbytes / bandwidth``."""

    def __init__(self, prior: TierSpeed, window: int = 64) -> None:
        super().__init__(prior, window)

    def speed(self) -> TierSpeed:
        """The prior until there are two observations."""
        if len(self._seen) < 2:
            return self._prior
        x, t = self._columns()
        weight = np.sqrt(np.linspace(0.2, 1.0, len(x)))
        slope = 0.0
        if np.ptp(x) > 0.05 * x.max():
            design = np.stack([np.ones_like(x), x], axis=1) * weight[:, None]
            latency, slope = np.linalg.lstsq(design, t * weight, rcond=None)[0]
        if slope <= 0 or latency < 0:
            # All of one size, or noise: keep the prior's share of latency, and fit the rest.
            latency = min(self._prior.latency, float(t.min()) / 2)
            slope = float(np.average((t - latency) / x, weights=weight))
        return TierSpeed(float(latency), 1.0 / float(slope))


class PrefillMeter(_Meter[PrefillSpeed]):
    """Speed of full prefill from observed prefills, in tokens; non-negative least squares on
    (1, n, n^2)."""

    def __init__(self, prior: PrefillSpeed, window: int = 128) -> None:
        super().__init__(prior, window)

    def speed(self) -> PrefillSpeed:
        """The prior until lengths differ enough to tell its terms apart."""
        if len(self._seen) < 3:
            return self._prior
        n, t = self._columns()
        if np.ptp(n) < 0.2 * n.max():
            prior = np.array([self._prior.time(int(x)) for x in n])
            scale = float((t / prior).mean())
            return PrefillSpeed(
                self._prior.fixed * scale, self._prior.linear * scale, self._prior.quadratic * scale
            )
        columns = [np.ones_like(n), n, n * n]
        keep = [0, 1, 2]
        # Relative errors count: a long prompt must not drown the short ones.
        while True:
            design = np.stack([columns[i] for i in keep], axis=1) / t[:, None]
            found = np.linalg.lstsq(design, np.ones_like(t), rcond=None)[0]
            if (found >= 0).all():
                break
            keep.pop(int(found.argmin()))
        terms = dict(zip(keep, map(float, found), strict=True))
        return PrefillSpeed(terms.get(0, 0.0), terms.get(1, 0.0), terms.get(2, 0.0))


class ChunkCost(NamedTuple):
    """A chunk that could be loaded. tier: where it lies, as ``Hit.tier`` says."""

    n_tokens: int
    nbytes: int
    tier: str


Action = Literal["load", "recompute"]


@dataclass(frozen=True)
class LoadPlan:
    """actions: one per chunk. ratio: recompute ratio of the loaded ones. load_s, compute_s: the two
    sides that overlap; total_s: what the prefill should take, with the first layer's load, which
    nothing hides."""

    actions: tuple[Action, ...]
    ratio: float
    load_s: float
    compute_s: float
    total_s: float


class LoadingController:
    """``floor``: the least recompute ratio that quality allows, 0..1. ``check_layers``: how many of
    ``n_layers`` run on all tokens before the selection. ``ahead``: the share of the layers, 0..1,
    that must be loaded before the blend begins."""

    def __init__(self, n_layers: int, check_layers: int, floor: float, ahead: float = 0.0):
        if not 0 <= floor <= 1:
            raise ConfigError(f"recompute floor {floor} is not between 0 and 1")
        if not 0 <= check_layers < n_layers:
            raise ConfigError(f"{check_layers} check layers do not fit a model of {n_layers}")
        if not 0 <= ahead <= 1:
            raise ConfigError(f"{ahead} of the layers ahead is not a share between 0 and 1")
        self.n_layers, self.check_layers, self.floor = n_layers, check_layers, floor
        self.ahead = ahead

    def true_share(self, ratio: float) -> float:
        """Share of a reused token's layers that is computed at this ratio."""
        c, n = self.check_layers, self.n_layers
        return (c + ratio * (n - c)) / n

    def ratio(self, load_s: float, prefill_s: float) -> float:
        """Smallest recompute ratio whose compute hides ``load_s``, at least the floor, at most 1.

        prefill_s: full prefill of the tokens in question.
        """
        if prefill_s <= 0:
            return self.floor
        c, n = self.check_layers, self.n_layers
        hides = (load_s / prefill_s * n - c) / (n - c)
        return min(1.0, max(self.floor, hides))

    def plan(
        self,
        chunks: Sequence[ChunkCost],
        fresh_tokens: int,
        prefill: PrefillSpeed,
        tiers: Mapping[str, TierSpeed],
    ) -> LoadPlan:
        """Which chunks to load so that the prefill ends soonest. Raises ConfigError on unknown
        tiers.

        Tiers load side by side; one tier's loads queue. Chunks whose loading is most expensive for
        the compute it saves are recomputed first; every such cut is tried.
        """
        for chunk in chunks:
            if chunk.tier not in tiers:
                raise ConfigError(unknown_name("tier", chunk.tier, tiers))
        total = fresh_tokens + sum(c.n_tokens for c in chunks)
        per_token = prefill.time(total) / max(1, total)
        order = sorted(
            range(len(chunks)),
            key=lambda i: -tiers[chunks[i].tier].load_time(chunks[i].nbytes) / chunks[i].n_tokens,
        )
        best = None
        for cut in range(len(chunks) + 1):
            plan = self._with(chunks, set(order[:cut]), fresh_tokens, per_token, tiers)
            if best is None or plan.total_s < best.total_s * (1 - 1e-9):
                best = plan
        return best

    def _with(self, chunks, recomputed, fresh_tokens, per_token, tiers) -> LoadPlan:
        waiting: dict[str, int] = {}
        loaded = computed = 0
        for i, chunk in enumerate(chunks):
            if i in recomputed:
                computed += chunk.n_tokens
            else:
                loaded += chunk.n_tokens
                waiting[chunk.tier] = waiting.get(chunk.tier, 0) + chunk.nbytes
        load_s = max((tiers[t].load_time(n) for t, n in waiting.items()), default=0.0)
        ahead_s = self.ahead * load_s
        fixed_s = (fresh_tokens + computed) * per_token
        # Fresh tokens are computed in any case, and hide their part of the load first.
        ratio = self.ratio(max(0.0, load_s - ahead_s - fixed_s), loaded * per_token)
        least = fixed_s + self.true_share(self.floor if loaded else 0.0) * loaded * per_token
        spent = fixed_s + self.true_share(ratio) * loaded * per_token if loaded else fixed_s
        total_s = ahead_s + max(load_s - ahead_s, least) + load_s / self.n_layers
        actions = tuple("recompute" if i in recomputed else "load" for i in range(len(chunks)))
        return LoadPlan(actions, ratio if loaded else 1.0, load_s, spent, total_s)
