"""compute-sanitizer over each kernel, by a program without Python (selftest.cu).

Each of its tools must say nothing of the kernels, and must find a fault that was planted: silence
of a tool that finds nothing means nothing.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from gpu.record import Job
from sgl_blend.folders import cache_root
from sgl_blend.ops import cuda_build, nvcc
from sgl_blend.ops.build import source_dir

SOURCE = Path(__file__).with_name("selftest.cu")
FAULTS = SOURCE.parents[1] / "cuda" / "faults.cuh"
#: tool -> planted faults that it must find: words of selftest, numbers as ``enum Fault``
FINDS = {
    "memcheck": (("out-of-bounds",), ("fault", "4")),
    "racecheck": (("fault", "2"), ("fault", "3")),
    "synccheck": (("fault", "7"),),
    "initcheck": (("not-set",),),
}
#: what one of its tools may or may not find, for the record
TOLD = {"racecheck": (("fault", "1"),), "synccheck": (("fault", "8"), ("fault", "11"))}
#: faults of the emulator, which must find all of them
EMULATED = [("fault", str(i)) for i in range(1, 13)]
_ERRORS = 9  # exit status where a tool has found something


def run(job: Job) -> None:
    if job.rehearse:
        program = _built(["g++", "-x", "c++", *_emulator_flags()])
        _emulated(job, program)
        return
    tool = shutil.which("compute-sanitizer") or _beside_nvcc("compute-sanitizer")
    if not job.check("compute-sanitizer is here", tool is not None):
        return
    compiler = cuda_build.find_nvcc()
    if not job.check("nvcc is here", compiler is not None):
        return
    target = cuda_build.target_of(torch.cuda.get_device_capability(job.device))
    program = _built([str(compiler), "-std=c++17", "-O1", "-lineinfo", f"-arch=sm_{target}"])
    job.check("the kernels, without a tool", _said(program, ["kernels"])[0] == 0)
    with ThreadPoolExecutor(len(FINDS)) as pool:
        for name in FINDS:
            pool.submit(job.trying, name, lambda n=name: _one_tool(job, program, tool, n))


def _one_tool(job: Job, program: Path, tool: str, name: str) -> None:
    command = [tool, "--tool", name, "--error-exitcode", str(_ERRORS)]
    status, said = _said(program, ["kernels"], command)
    job.check(f"{name}: nothing in the kernels", status == 0, said=said if status else "")
    for words in FINDS[name]:
        status, said = _said(program, words, command)
        job.check(f"{name} finds {_name(words)}", status == _ERRORS, said=said)
    for words in TOLD.get(name, ()):
        status, said = _said(program, words, command)
        job.note(f"{name}, {_name(words)}", "found" if status == _ERRORS else "not found")


def _emulated(job: Job, program: Path) -> None:
    import emulated

    ways = [[str(x) for x in way] for way in emulated.SCHEDULES]
    right = all(_said(program, ["kernels", *way])[0] == 0 for way in ways)
    job.check("emulator: nothing in the kernels", right)
    job.check("emulator: nothing without a fault", _said(program, ["fault", "0", "0", "0"])[0] == 0)
    for words in EMULATED:
        found = [_said(program, [*words, *way]) for way in ways]
        said = next((text for status, text in found if status), "")
        job.check(f"emulator finds {_name(words)}", bool(said), said=said)


def _emulator_flags() -> list[str]:
    import emulated

    return [*emulated.FLAGS, "-DBLEND_EMULATED=1", f"-I{emulated.headers()}"]


def _built(command: list[str]) -> Path:
    """The program, compiled once for its sources and ``command``."""
    digest = hashlib.sha256(" ".join(command).encode())
    for path in (SOURCE, FAULTS, *sorted(source_dir().glob("*/*"))):
        digest.update(path.read_bytes())
    program = cache_root() / f"selftest-{digest.hexdigest()[:16]}"
    if not program.is_file():
        program.parent.mkdir(parents=True, exist_ok=True)
        partial = program.with_suffix(".partial")
        where = [f"-I{source_dir()}", str(SOURCE), "-o", str(partial)]
        subprocess.run([*command, *where], check=True, stderr=sys.stderr)
        partial.replace(program)
    return program


def _beside_nvcc(name: str) -> str | None:
    compiler = cuda_build.find_nvcc()
    home = nvcc.cuda_home(compiler) if compiler else Path("/usr/local/cuda")
    return shutil.which(str(home / "bin" / name)) or shutil.which(
        str(home / "compute-sanitizer" / name)
    )


def _said(program: Path, words, before=()) -> tuple[int, str]:
    """Exit status, and the last line that tells something."""
    try:
        done = subprocess.run(
            [*before, str(program), *words], capture_output=True, text=True, timeout=120
        )
    except subprocess.TimeoutExpired:
        return _ERRORS if before else 1, "it hung"
    print(done.stdout, done.stderr)
    lines = [x.strip("= ") for x in (done.stdout + done.stderr).splitlines() if x.strip("= ")]
    errors = [x for x in lines if "rror" in x and "0 errors" not in x]
    return done.returncode, (errors or lines or [""])[-1][:200]


def _name(words) -> str:
    names = (
        "waiting for other copies", "no barrier before use", "no barrier behind use",
        "misaligned vectors", "copies in flight", "copies never committed",
        "a shuffle of half a warp", "shuffles at two places", "a shuffle from outside its mask",
        "barriers at two places", "a thread that ends before a barrier",
        "shared memory that is not set",
    )  # fmt: skip
    return names[int(words[1]) - 1] if words[0] == "fault" else words[0]
