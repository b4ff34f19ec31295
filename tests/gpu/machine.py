"""What is here, whether our kernels load and are right on it, and what the device can do."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import subprocess
from typing import Any

import torch

from gpu import clock
from gpu.record import Job
from sgl_blend.ops import cuda_build, cuda_check, nvcc

PACKAGES = ("apache-tvm-ffi", "triton", "flashinfer-python", "sglang", "sglang-kernel", "numpy")
UNITS = {"copy": "GB/s", "to_device": "GB/s", "to_host": "GB/s", "flops": "TFLOP/s"}


def run(job: Job) -> None:
    job.note("Python", platform.python_version())
    job.note("torch", torch.__version__, cuda=torch.version.cuda)
    for name in PACKAGES:
        job.note(name, _version(name))
    compiler = cuda_build.find_nvcc()
    job.note("nvcc", nvcc.version(compiler) if compiler else "none")
    for tool in ("compute-sanitizer", "ncu", "ninja"):
        job.note(tool, shutil.which(tool) or "none")
    job.trying("says what it is", lambda: _device(job))
    job.trying("kernels", lambda: _kernels(job))
    found = clock.ceilings(job.device, job.rehearse)
    clock.keep(job.out, found)
    for name, value in found.items():
        job.note(f"at most: {name}", value / (1e12 if name == "flops" else 1e9), UNITS[name])


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _device(job: Job) -> None:
    if job.rehearse:
        job.note("device", "none: a rehearsal")
        return
    p = torch.cuda.get_device_properties(job.device)
    job.note("device", p.name, compute=f"{p.major}.{p.minor}", SMs=p.multi_processor_count,
             GiB=round(p.total_memory / 2**30, 1))  # fmt: skip
    query = "--query-gpu=driver_version,power.limit,clocks.max.sm,pcie.link.gen.max"
    said = subprocess.run(
        ["nvidia-smi", query, "--format=csv,noheader"], capture_output=True, text=True, check=True
    )
    job.note("driver, power, clock, PCIe", said.stdout.strip().splitlines()[0])


def _kernels(job: Job) -> None:
    module = module_of(job)
    if job.check("the kernels load", module is not None):
        wrong = cuda_check.differing(module, job.device)
        said = "; ".join(text for texts in wrong.values() for text in texts)
        job.check("the kernels give torch's results", not wrong, said=said)


def module_of(job: Job) -> Any | None:
    """The device's kernels; in a rehearsal the emulator's."""
    if job.rehearse:
        import emulated

        return emulated.kernels()
    target = cuda_build.target_of(torch.cuda.get_device_capability(job.device))
    return cuda_build.cuda_module(target)
