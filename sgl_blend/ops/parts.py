"""KV outside the pool, in parts that lie anywhere: a loaded chunk's each."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from sgl_blend.ops import checks, cuda
from sgl_blend.ops.build import cpu_module, launch
from sgl_blend.ops.checks import require
from sgl_blend.ops.cuda_build import kernels

#: launchers that read parts where they lie
READERS = ("rotate_from", "take_from")


class Parts:
    """KV of tokens that lie in several places outside the pool, for a range of layers.

    k [layers, n_i, Hk, D] and v [layers, n_i, Hk, Dv], one of each for every place, all of one
    dtype and on one device; ``tokens`` is the sum of n_i. Checked once, for all layers.

    Raises:
        KernelError: parts that do not fit each other.
    """

    def __init__(self, k: Sequence[torch.Tensor], v: Sequence[torch.Tensor]) -> None:
        require(len(k) == len(v) > 0, f"{len(k)} parts of K and {len(v)} parts of V")
        first = [_kind(x) for x in (k[0], v[0])]
        for i, (a, b) in enumerate(zip(k, v, strict=True)):
            if i and [_kind(a), _kind(b)] == first and a.shape[1] == b.shape[1]:
                continue
            checks.cached(f"k[{i}]", a, 4, k[0].device)
            checks.cached(f"v[{i}]", b, 4, k[0].device)
            for name, part, like in ((f"k[{i}]", a, k[0]), (f"v[{i}]", b, v[0])):
                require(
                    part.shape[0] == k[0].shape[0]
                    and part.shape[1] == a.shape[1]
                    and part.shape[2:] == like.shape[2:]
                    and part.dtype == k[0].dtype,
                    f"{name} {list(part.shape)} {part.dtype} does not fit {list(like.shape)} "
                    f"{k[0].dtype}, or has other tokens than its K",
                )
        self.k, self.v = [x.detach() for x in k], [x.detach() for x in v]
        self.layers = k[0].shape[0]
        self.tokens = sum(x.shape[1] for x in k)
        self.device = k[0].device
        self._places: dict[torch.device, torch.Tensor | None] = {}

    def layer(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """One layer's K [n, Hk, D] and V [n, Hk, Dv], joined: copies."""
        return torch.cat([x[layer] for x in self.k]), torch.cat([x[layer] for x in self.v])

    def take(self, layer: int, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The tokens ``index`` (int64 [c], into all parts' tokens) of ``layer``: copies of their K
        [c, Hk, D] and V [c, Hk, Dv].

        Raises:
            KernelError: no such layer, or an index outside the parts (checked on the CPU).
        """
        self.require_layer(layer)
        index = checks.index("index", index, self.device)
        module = cpu_module(index.device)
        if module is None:
            checks.in_range("index", index, self.tokens)
            k, v = self.layer(layer)
            return k[index], v[index]
        n = index.shape[0]
        out = [x[0].new_empty(n, *x[0].shape[2:]) for x in (self.k, self.v)]
        launch(functools.partial(module.take_from, *self.arrays, layer), (index, *out), ())
        return out[0], out[1]

    def send(
        self,
        layer: int,
        k: torch.Tensor | None,
        v: torch.Tensor,
        index: torch.Tensor | None = None,
    ) -> None:
        """Copy one layer from the host into k [n, Hk, D] and v [n, Hk, Dv] on a GPU, dense; only
        V where k is None, only the tokens ``index`` (int64 [c], on the GPU) where it is given.

        In one launch where the GPU reads the parts where they lie (``places``). Else the layer is
        joined in page-locked memory, by the caller's thread, and sent in one copy for each of K and
        V. Nobody waits for the device.

        Raises:
            KernelError: arguments that do not fit.
        """
        self.require_layer(layer)
        count = self.tokens if index is None else index.shape[0]
        for name, out, like in (("k", k, self.k[0]), ("v", v, self.v[0])):
            require(
                out is None
                or (
                    out.dtype == like.dtype
                    and out.shape == (count, *like.shape[2:])
                    and out.device == v.device
                    and out.is_contiguous()
                ),
                f"{name} does not fit {count} tokens of {list(like.shape[2:])} {like.dtype} on "
                f"{v.device}",
            )
        if index is not None:
            index = checks.index("index", index, v.device)
        places = self.places(v.device)
        if count == 0:
            return
        if places is not None and all(cuda.aligned(x) for x in (k, v) if x is not None):
            module = kernels(v.device, *READERS)
            cuda.take_from(module, places, layer, self.blocks(v.device), k, v, index)
            return
        for out, parts in ((k, self.k), (v, self.v)):
            if out is None:
                continue
            joined = _joined(parts, layer, v.device)
            if index is None:
                out.copy_(joined, non_blocking=True)
            else:
                torch.index_select(joined.to(v.device, non_blocking=True), 0, index, out=out)

    def require_layer(self, layer: int) -> None:
        require(0 <= layer < self.layers, f"layer {layer} of parts that have {self.layers}")

    @functools.cached_property
    def arrays(self) -> tuple[object, object]:
        """What the CPU kernels take. Handing over hundreds of tensors costs more than a layer's
        copy."""
        from tvm_ffi import convert

        return convert(self.k), convert(self.v)

    def places(self, device: torch.device) -> torch.Tensor | None:
        """Addresses at which the kernels of the GPU ``device`` read the parts (``cuda.places_of``),
        on ``device``: parts of its own, or page-locked ones of the host, which it reads over the
        bus. ``None`` where they do not: other memory, other layouts, or there are no kernels."""
        if device not in self._places:
            reached = self.device == device or (
                self.device.type == "cpu" and all(x.is_pinned() for x in (*self.k, *self.v))
            )
            self._places[device] = (
                cuda.places_of(self.k, self.v, device)
                if reached and kernels(device, *READERS) is not None
                else None
            )
        return self._places[device]

    def blocks(self, device: torch.device) -> int:
        """At most how many blocks of a kernel read them on ``device``; 0: any number."""
        return 0 if self.device == device else cuda.BUS_BLOCKS


def _joined(parts: Sequence[torch.Tensor], layer: int, device: torch.device) -> torch.Tensor:
    """One layer of ``parts``, in memory that is page-locked for ``device``. PyTorch keeps it until
    copies out of it are done, and then gives it out again."""
    like = parts[0][layer]
    shape = (sum(x.shape[1] for x in parts), *like.shape[1:])
    out = torch.empty(shape, dtype=like.dtype, pin_memory=device.type == "cuda")
    return torch.cat([x[layer] for x in parts], out=out)


def _kind(part: torch.Tensor) -> tuple[object, ...]:
    """What parts that were found right have in common, but for their tokens."""
    layers, _, *rest = part.shape if part.dim() > 1 else (0, 0)
    return layers, rest, part.dtype, part.device, part.stride(-1) if part.dim() else 0
