"""A CUDA device in pretence: tensors of the CPU that say they lie on ``cuda:0``, and what would
have made the host wait for it.

Between ``watching()`` and its end

* ``torch.empty(..., device="cuda")``, ``x.to("cuda")`` and what is computed of such tensors are
  :class:`OnDevice`; ``x.device`` and ``x.is_cuda`` say so. ``pin_memory`` makes :class:`Locked`.
* an operation that mixes them with tensors of the host fails as it does on a GPU;
* streams and events are recorded in ``Watch.log`` in the order in which they are asked for, and
  copies to the host that wait for nothing, with the stream that they are asked of;
* what waits is in ``Watch.waits``, with the line of the code under test that asked for it.

What waits (PyTorch 2.14, read in its source): reading a value (``item``, ``bool``, ``tolist``, a
tensor as a bound of a slice), ``nonzero`` and whatever calls it (a mask as an index), copies to the
host, copies from memory that is not page-locked or not ``non_blocking``, ``x[index] = 1.0`` (the
number is copied to the device first), and waiting for a stream or an event.

It sees what goes through PyTorch's Python functions and its dispatcher. It does not see: what a
compiled kernel's launcher does beside its launch, waits of the CUDA driver (a module that is
loaded, memory that is allocated or freed), and copies whose page-locked memory is given away too
early. The order of work on the device is not simulated: each operation runs at once.
"""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

CUDA = torch.device("cuda", 0)
CPU = torch.device("cpu")
aten = torch.ops.aten

#: code under test, as far as lines are named
_MINE = ("sgl_blend", "flashinfer")


class OnDevice(torch.Tensor):
    """Says that it lies on the device."""

    __torch_function__ = torch._C._disabled_torch_function_impl


class Locked(torch.Tensor):
    """Lies in page-locked memory of the host."""

    __torch_function__ = torch._C._disabled_torch_function_impl


def on_device(x: torch.Tensor) -> torch.Tensor:
    """``x``, on the device already; the same memory."""
    return x.as_subclass(OnDevice)


def locked(x: torch.Tensor) -> torch.Tensor:
    """``x``, in page-locked memory; the same memory."""
    return x.as_subclass(Locked)


def on_host(x: torch.Tensor) -> torch.Tensor:
    """``x`` for a test to look at; the same memory."""
    return x.as_subclass(torch.Tensor)


@dataclass
class Watch:
    """waits: (what, file, line) of each wait. launches: (operation, file, line) of each that would
    launch a kernel or a copy on the device. copies: bytes of each copy to the device that waits
    for nothing. log: what streams and events were asked for, and copies to the host."""

    waits: list[tuple[str, str, int]] = field(default_factory=list)
    launches: list[tuple[str, str, int]] = field(default_factory=list)
    copies: list[int] = field(default_factory=list)
    log: list[tuple[Any, ...]] = field(default_factory=list)

    def wait(self, what: str) -> None:
        self.waits.append((what, *_line()))

    def launch(self, what: str) -> None:
        self.launches.append((what, *_line()))

    def table(self) -> list[str]:
        """One line a place: how often, where, what."""
        counted = Counter(self.waits)
        return [
            f"{n:3}  {file}:{line}  {what}"
            for (what, file, line), n in sorted(counted.items(), key=lambda x: x[0][1:])
        ]


@contextlib.contextmanager
def watching() -> Iterator[Watch]:
    watch = Watch()
    with contextlib.ExitStack() as stack:
        for name, value in _cuda(watch).items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        note = lambda x, stream: watch.log.append(("record_stream", stream.name))  # noqa: E731
        stack.enter_context(mock.patch.object(torch.Tensor, "record_stream", note))
        inner = _Dispatched(watch)
        stack.enter_context(_Functions(watch, inner))
        yield watch


def _line() -> tuple[str, int]:
    """The innermost line of the code under test; else the innermost of a test."""
    frame, other = sys._getframe(1), ("", 0)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        for name in _MINE:
            if name in path.parts:
                at = len(path.parts) - 1 - path.parts[::-1].index(name)
                return "/".join(path.parts[at:]), frame.f_lineno
        if not other[0] and "tests" in path.parts and path.name != Path(__file__).name:
            other = (path.name, frame.f_lineno)
        frame = frame.f_back
    return other


def _is_mask(index: Any) -> bool:
    return isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8)


def _is_view(func: Any) -> bool:
    """Does what it returns share the memory of what it is given, unchanged?"""
    shared = [x.alias_info for x in func._schema.returns]
    return any(x is not None and not x.is_write for x in shared)


class _Dispatched(TorchDispatchMode):
    """What PyTorch's own functions call. ``active``: for tensors of the device."""

    WAITS = {
        aten._local_scalar_dense.default: "reads a value",
        aten.nonzero.default: "nonzero",
        aten.masked_select.default: "masked_select",
        aten._unique2.default: "unique",
        aten.unique_dim.default: "unique",
        aten.bincount.default: "bincount",
        aten.equal.default: "equal",
    }
    RESERVES = (
        aten.empty.memory_format,
        aten.empty_like.default,
        aten.empty_strided.default,
        aten.new_empty.default,
        aten._local_scalar_dense.default,
    )
    PUTS = (aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default)

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func not in self.RESERVES and not _is_view(func):
            self.watch.launch(func._schema.name.removeprefix("aten::"))
        if func in self.WAITS:
            self.watch.wait(self.WAITS[func])
        elif func is aten.repeat_interleave.Tensor and kwargs.get("output_size") is None:
            self.watch.wait("repeat_interleave by a tensor")
        elif func is aten.index.Tensor and any(map(_is_mask, args[1])):
            self.watch.wait("a mask as an index")
        elif func in self.PUTS and any(map(_is_mask, args[1])) and args[2].numel() != 1:
            self.watch.wait("a mask as an index")  # one value goes by masked_fill
        return func(*args, **kwargs)


class _Functions(TorchFunctionMode):
    """Keeps track of where tensors lie."""

    def __init__(self, watch: Watch, inner: _Dispatched) -> None:
        super().__init__()
        self.watch, self.inner = watch, inner

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        first = args[0] if args else None
        if name == "__get__":
            return self._property(func, args)
        if isinstance(first, torch.Tensor) and name in _MOVES:
            return getattr(self, f"_{name}")(func, first, args[1:], kwargs)
        if name == "as_subclass":
            return func(*args, **kwargs)
        wanted = kwargs.get("device")
        to_device = wanted is not None and torch.device(wanted).type == "cuda"
        if to_device:
            kwargs["device"] = CPU
        if kwargs.pop("pin_memory", False):
            return locked(func(*args, **kwargs))
        if to_device and name in ("tensor", "as_tensor"):
            self.watch.wait("a copy from pageable memory")
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        mine = [x for x in tensors if isinstance(x, OnDevice)]
        if not mine:
            with self.inner if to_device else contextlib.nullcontext():
                out = func(*args, **kwargs)
            return _marked(out, OnDevice) if to_device else self._still_locked(out, tensors)
        if name in ("__getitem__", "__setitem__"):
            self._indexed(name, args)
        elif any(not isinstance(x, OnDevice) and x.dim() for x in tensors):
            raise RuntimeError(f"{name}: expected all tensors to be on the same device")
        if name in _READS:
            self.watch.wait("reads a value")
            return func(*args, **kwargs)
        with self.inner:
            out = func(*args, **kwargs)
        return _marked(out, OnDevice)

    def _still_locked(self, out: Any, tensors: list[torch.Tensor]) -> Any:
        """Views of page-locked memory are page-locked."""
        kept = {x.untyped_storage().data_ptr() for x in tensors if isinstance(x, Locked)}
        if not kept:
            return out

        def mark(x: Any) -> Any:
            view = isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() in kept
            return locked(x) if view else x

        return tree_map(mark, out)

    def _property(self, func, args):
        x = args[0]
        what = getattr(getattr(func, "__self__", None), "__name__", "")
        if isinstance(x, OnDevice):
            if what == "device":
                return CUDA
            if what == "is_cuda":
                return True
            if what == "is_cpu":
                return False
        out = func(*args)
        if isinstance(x, (OnDevice, Locked)) and isinstance(out, torch.Tensor):
            return out.as_subclass(type(x))
        return out

    def _indexed(self, name: str, args: tuple[Any, ...]) -> None:
        index = args[1] if isinstance(args[1], tuple) else (args[1],)
        tensors = [i for i in index if isinstance(i, torch.Tensor)]
        listed = any(isinstance(i, (list, range)) for i in index)
        if listed or any(not isinstance(i, OnDevice) and i.dim() for i in tensors):
            self.watch.wait("an index of the host")
        if name == "__setitem__":
            value = args[2]
            off = not isinstance(value, OnDevice)
            if off and (listed or any(not _is_mask(i) and i.dim() for i in tensors)):
                self.watch.wait("a number of the host by index")
            elif off and isinstance(value, torch.Tensor):
                self.watch.wait("a copy from pageable memory")

    # Functions that move tensors, by name.

    def _move(self, x: torch.Tensor, target: torch.device, non_blocking: bool) -> torch.Tensor:
        there = isinstance(x, OnDevice)
        if (target.type == "cuda") == there:
            return x
        if there:
            self.watch.wait("a copy to the host")
            return on_host(x).clone()
        if not isinstance(x, Locked):
            how = "a non-blocking copy" if non_blocking else "a copy"
            self.watch.wait(f"{how} from pageable memory")
        elif not non_blocking:
            self.watch.wait("a copy that is waited for")
        else:
            self.watch.copies.append(x.nbytes)
            self.watch.launch("copy to the device")
        return on_device(x.clone())

    def _to(self, func, x, args, kwargs):
        args = list(args)
        non_blocking = bool(kwargs.pop("non_blocking", False))
        target = kwargs.pop("device", None)
        if args and isinstance(args[0], torch.Tensor):
            target, like = self._device_of(args[0]), args.pop(0)
            kwargs["dtype"] = like.dtype
        elif args and isinstance(args[0], (torch.device, str, int)):
            target = args.pop(0)
        moved = x if target is None else self._move(x, torch.device(target), non_blocking)
        if not args and not {k for k, v in kwargs.items() if v is not None}:
            return moved
        kind = type(moved)
        out = func(moved, *args, **kwargs)
        return out.as_subclass(kind if kind is OnDevice else type(out))

    @staticmethod
    def _device_of(x: torch.Tensor) -> torch.device:
        return CUDA if isinstance(x, OnDevice) else CPU

    def _cpu(self, func, x, args, kwargs):
        return self._move(x, CPU, False)

    def _cuda(self, func, x, args, kwargs):
        return self._move(x, CUDA, bool(kwargs.get("non_blocking", False)))

    def _pin_memory(self, func, x, args, kwargs):
        return x if isinstance(x, Locked) else locked(x.clone())

    def _is_pinned(self, func, x, args, kwargs):
        return isinstance(x, Locked)

    def _copy_(self, func, x, args, kwargs):
        source = args[0] if args else kwargs.pop("src")
        non_blocking = bool(kwargs.pop("non_blocking", False) or (len(args) > 1 and args[1]))
        here, there = isinstance(source, OnDevice), isinstance(x, OnDevice)
        if here and not there:
            if isinstance(x, Locked) and non_blocking:
                self.watch.log.append(("copy out", torch.cuda.current_stream().name))
            else:
                self.watch.wait("a copy to the host")
        elif there and not here:
            self._move(source, CUDA, non_blocking)
        on_host(x).copy_(on_host(source))
        return x


_MOVES = ("to", "cpu", "cuda", "pin_memory", "is_pinned", "copy_")
_READS = ("tolist", "numpy", "__array__")


def _marked(out: Any, kind: type[torch.Tensor]) -> Any:
    return tree_map(lambda x: x.as_subclass(kind) if isinstance(x, torch.Tensor) else x, out)


def _cuda(watch: Watch) -> dict[str, Any]:
    """Stands for parts of ``torch.cuda``. Streams are named in the order in which they are made."""
    log = watch.log
    current: list[Any] = []

    class Event:
        def __init__(self, *args: Any, **kw: Any) -> None:
            self.recorded: Any = None

        def record(self, stream: Any = None) -> None:
            self.recorded = (stream or current[-1]).name
            log.append(("record", self.recorded))

        def query(self) -> bool:
            return True

        def wait(self, stream: Any = None) -> None:
            (stream or current[-1]).wait_event(self)

        def synchronize(self) -> None:
            watch.wait("waits for an event")

    class Stream:
        made = 0

        def __init__(self, device: Any = None, priority: int = 0) -> None:
            self.name = f"stream {Stream.made}"
            self.device = CUDA
            self.cuda_stream = Stream.made
            Stream.made += 1
            log.append(("stream", self.name))

        def wait_event(self, event: Event) -> None:
            log.append(("wait", self.name, event.recorded))

        def wait_stream(self, other: Stream) -> None:
            log.append(("wait", self.name, other.name))

        def record_event(self, event: Event | None = None) -> Event:
            event = event or Event()
            event.record(self)
            return event

        def synchronize(self) -> None:
            log.append(("synchronize", self.name))
            watch.wait("waits for a stream")

    @contextlib.contextmanager
    def stream(which: Any) -> Iterator[None]:
        current.append(which or current[-1])
        try:
            yield
        finally:
            current.pop()

    forward = Stream()
    forward.name = "forward"
    log.clear()
    current.append(forward)
    return {
        "Event": Event,
        "Stream": Stream,
        "stream": stream,
        "current_stream": lambda device=None: current[-1],
        "synchronize": lambda device=None: watch.wait("waits for the device"),
        "set_device": lambda device: log.append(("set_device", str(device))),
        "current_device": lambda: 0,
    }
