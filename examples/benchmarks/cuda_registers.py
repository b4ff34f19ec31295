"""Compiles the CUDA kernels for every target and writes what each needs: registers and spills.

    python examples/benchmarks/cuda_registers.py [SOURCE ...]

Needs nvcc 12.8 or newer and ``c++filt`` (binutils), no GPU. Writes ``results/cuda_registers.md``
beside this script. SOURCEs of ``csrc/cuda``: of the others the table keeps what it has. Minutes on
one core.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from sgl_blend.ops import cuda_build
from sgl_blend.ops.build import source_dir

ENTRY = re.compile(r"Compiling entry function '(\w+)' for 'sm_(\w+)'")
SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
REGISTERS = re.compile(r"Used (\d+) registers")


def main() -> None:
    target = Path(__file__).with_name("results") / "cuda_registers.md"
    nvcc = cuda_build.find_nvcc()
    if nvcc is None:
        raise SystemExit("no nvcc was found: install the CUDA toolkit")
    found: dict[str, dict[str, str]] = {}
    seconds: dict[str, str] = {}
    if sys.argv[1:]:
        found, seconds = _written(target.read_text())
    for source in sys.argv[1:] or cuda_build.SOURCES:
        begin = time.monotonic()
        said = _compile(nvcc, source_dir() / "cuda" / source)
        seconds[source] = f"{time.monotonic() - begin:.0f}"
        for name, arch, need in _needs(said):
            found.setdefault(name, {})[arch] = need
        print(f"{source}: {len(found)} kernels", flush=True)
    took = [f"`{name}` {seconds[name]} s" for name in cuda_build.SOURCES if name in seconds]
    target.write_text(_table(found, _version(nvcc), took))
    print(target)


def _written(table: str) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """What each kernel needs by architecture, and each source's seconds, of a table."""
    found = {
        name: dict(zip(cuda_build.TARGETS, needs.split(" | "), strict=True))
        for name, needs in re.findall(r"^\| `(.+?)` \| (.+) \|$", table, re.M)
    }
    return found, dict(re.findall(r"`(\w+\.cu)` (\d+) s", table))


def _compile(nvcc: Path, source: Path) -> str:
    """What ptxas says of ``source`` for all targets, PTX for later ones beside them."""
    command = [str(nvcc), *cuda_build.FLAGS, "-Xptxas", "-v"]
    command += [f"-gencode=arch=compute_{t},code=sm_{t}" for t in cuda_build.TARGETS]
    command += [f"-gencode=arch=compute_{cuda_build.PTX},code=compute_{cuda_build.PTX}"]
    command += [f"-I{path}" for path in cuda_build.includes()]
    with tempfile.TemporaryDirectory() as folder:
        command += ["-c", str(source), "-o", f"{folder}/kernels.o"]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return done.stderr


def _needs(said: str) -> list[tuple[str, str, str]]:
    """(kernel, architecture, "registers" or "registers, spills N B")."""
    out, name, arch, spills = [], "", "", 0
    for line in said.splitlines():
        if entry := ENTRY.search(line):
            name, arch = entry.groups()
        elif spilled := SPILLS.search(line):
            spills = max(map(int, spilled.groups()))
        elif used := REGISTERS.search(line):
            need = used[1] + (f", spills {spills} B" if spills else "")
            out.append((_plain(name), arch, need))
    return out


def _plain(name: str) -> str:
    """``void blend::cuda::name<...>(...)`` as ``name<...>``."""
    done = subprocess.run(["c++filt", name], capture_output=True, text=True, check=True)
    text = re.sub(
        r"\(anonymous namespace\)::|blend::cuda::|\((bool|int)\)", "", done.stdout.strip()
    )
    return text.split("(")[0].removeprefix("void ")


def _version(nvcc: Path) -> str:
    said = subprocess.run([str(nvcc), "--version"], capture_output=True, text=True, check=True)
    return re.search(r"release [\d.]+, V([\d.]+)", said.stdout)[1]


def _table(found: dict[str, dict[str, str]], version: str, seconds: list[str]) -> str:
    targets = cuda_build.TARGETS
    rows = [
        f"| `{name}` | " + " | ".join(found[name].get(t, "-") for t in targets) + " |"
        for name in sorted(found)
    ]
    return "\n".join(
        [
            "# What the CUDA kernels need",
            "",
            "Registers a thread, by architecture; spills where there are any. Written by",
            f"`examples/benchmarks/cuda_registers.py` with nvcc {version}, no GPU. nvcc took, for",
            f"all targets and PTX, on a busy machine of two cores: {', '.join(seconds)}.",
            "",
            "| kernel | " + " | ".join(f"sm_{t}" for t in targets) + " |",
            "|---|" + "---|" * len(targets),
            *rows,
            "",
        ]
    )


if __name__ == "__main__":
    main()
