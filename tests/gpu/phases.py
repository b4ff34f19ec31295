"""The phases of ``run_all``, in their order."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Phase:
    """module: has ``run(job)`` (``record.Job``). seconds: what it may take. needs: beside torch,
    numpy, msgspec, xxhash, tvm-ffi. rehearsed: what of it runs without a GPU (``--rehearse``);
    other: what does not."""

    name: str
    module: str
    seconds: int
    needs: str
    rehearsed: str
    other: str


PHASES = (
    Phase(
        "machine",
        "gpu.machine",
        120,
        "nvcc, or kernels that were built ahead of time",
        "the measurements, on CPU tensors",
        "loading the kernels for a device and their comparison with torch on it",
    ),
    Phase(
        "parity",
        "gpu.parity",
        240,
        "pytest",
        "the tests of the kernels by way of the device's tensors, and random shapes, both in the "
        "emulator",
        "pools of more than 2 GiB; page-locked memory read by the kernel",
    ),
    Phase(
        "sanitizer",
        "gpu.sanitizer",
        240,
        "nvcc, compute-sanitizer",
        "the same programs, compiled by g++ for the emulator, which takes the sanitizer's place",
        "compute-sanitizer's own tools",
    ),
    Phase(
        "rooflines",
        "gpu.rooflines",
        180,
        "",
        "every measurement with few tokens; the shares mean nothing there",
        "events of the device, a flushed L2",
    ),
    Phase(
        "counters",
        "gpu.counters",
        90,
        "ncu",
        "the program that is measured, with few tokens",
        "ncu itself",
    ),
    Phase(
        "streams",
        "gpu.streams",
        150,
        "",
        "a blended prefill on a pretended device whose waits are counted; offload and load without "
        "streams",
        "torch.cuda.set_sync_debug_mode; the race itself and its negative control",
    ),
    Phase(
        "model",
        "gpu.model",
        420,
        "40 GB of device memory, or fewer layers",
        "a small model in fp32: full prefill, every policy, the mechanics",
        "the 8B shape and its times",
    ),
    Phase(
        "server",
        "gpu.server",
        420,
        "SGLang with sgl_kernel",
        "the servers' commands, parsed by SGLang where it is installed",
        "the servers themselves",
    ),
)  # fmt: skip
BY_NAME = {phase.name: phase for phase in PHASES}
