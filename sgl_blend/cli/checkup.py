"""What ``sgl-blend doctor`` looks at on this machine, without a server: one function a subject."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from sgl_blend import __version__, folders
from sgl_blend.cli.size import amount
from sgl_blend.config import BLEND
from sgl_blend.errors import BlendError, ConfigError
from sgl_blend.host_memory import UNKNOWN, available_memory
from sgl_blend.option_kinds import parse_size

OK, NOTE, WARNING, FAULT = "ok", "note", "warning", "fault"
#: what ``facts`` has found of a kind
Gather = Callable[[str], Mapping[str, Any]]

#: entry points by which SGLang finds this package
_PLUGINS = {"sglang.srt.plugins": "sgl_blend", "sglang.srt.platforms": "sgl_blend_cpu"}
#: what the kernels' builds and small models take
_CACHE_BYTES = 1 << 30
#: below it a server on a CPU has no room for weights, pool and store
_MEMORY_BYTES = 4 << 30


@dataclass(frozen=True, slots=True)
class Finding:
    """level: ``ok``; ``note`` (worth knowing); ``warning`` (it runs, but not as well as it could);
    ``fault`` (it does not run, or not right). remedy: what to do, for the last two."""

    subject: str
    level: str
    text: str
    remedy: str = ""


def versions() -> Iterator[Finding]:
    """Python, this package, and what it is built for."""
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "AMD64", "aarch64"):
        where = f"{sys.platform} on {platform.machine()}"
        yield Finding("versions", FAULT, f"this is {where}", "run it on Linux, as SGLang")
    yield Finding(
        "versions",
        OK if sys.version_info >= (3, 11) else FAULT,
        f"sgl-blend {__version__}, Python {platform.python_version()}",
        "" if sys.version_info >= (3, 11) else "install Python 3.11 or newer",
    )
    from sgl_blend.engine.seams import SGLANG_VERSION

    for name, wanted in (("sglang", SGLANG_VERSION), ("torch", None), ("flashinfer-python", None)):
        try:
            found = metadata.version(name)
        except metadata.PackageNotFoundError:
            pinned = name if wanted is None else f"{name}=={wanted}"
            yield Finding("versions", FAULT, f"{name} is not installed", f"pip install {pinned}")
            continue
        if wanted in (None, found):
            yield Finding("versions", OK, f"{name} {found}")
        else:
            yield Finding(
                "versions",
                FAULT,
                f"{name} {found} is installed; this sgl-blend is built for {wanted}",
                f"pip install {name}=={wanted}, or install the sgl-blend made for {found}",
            )


def plugin(environ: Mapping[str, str] = os.environ) -> Iterator[Finding]:
    """Does SGLang find this package? It says nothing where it does not, and ``--enable-blend`` is
    then an unknown flag."""
    for group, name in _PLUGINS.items():
        if not any(e.name == name for e in metadata.entry_points(group=group)):
            yield Finding(
                "plugin",
                FAULT,
                f"SGLang does not find {name}: there is no entry point of the group {group}",
                "pip install this package; a folder on PYTHONPATH is not enough",
            )
            return
    listed = [n.strip() for n in environ.get("SGLANG_PLUGINS", "").split(",") if n.strip()]
    if listed and "sgl_blend" not in listed:
        yield Finding(
            "plugin",
            FAULT,
            f"SGLANG_PLUGINS is {environ['SGLANG_PLUGINS']!r}: SGLang leaves sgl_blend out",
            "add sgl_blend to it, or unset it",
        )
    elif environ.get("SGLANG_PLATFORM") not in (None, "", "sgl_blend_cpu"):
        yield Finding(
            "plugin",
            FAULT,
            f"SGLANG_PLATFORM is {environ['SGLANG_PLATFORM']!r}: SGLang leaves out every package "
            "with another platform, and so this one",
            "unset it",
        )
    else:
        yield Finding("plugin", OK, "SGLang finds it")


def options(environ: Mapping[str, str] = os.environ) -> Iterator[Finding]:
    """Variables that a launch would read."""
    given = sorted(BLEND.prefixes[-1] + name for name in BLEND.variables(environ))
    try:
        BLEND.load()
    except ConfigError as e:
        yield Finding("options", FAULT, str(e), "correct or unset it: no launch gets past it")
        return
    if given:
        yield Finding("options", NOTE, f"set for every launch: {', '.join(given)}")
    else:
        yield Finding("options", OK, "no variable sets any")


def symbols(gather: Gather) -> Iterator[Finding]:
    """Every symbol of SGLang that is hooked, called or overridden."""
    found = gather("symbols")
    if "failed" in found:
        yield Finding(
            "symbols",
            FAULT,
            f"SGLang cannot be imported: {found['failed']}",
            "mend the installation until `python -m sglang.launch_server --help` works",
        )
        return
    for problem in found["problems"]:
        yield Finding("symbols", FAULT, problem, "install the version that it is built for")
    if not found["problems"]:
        text = (
            f"all {found['symbols']} of SGLang's that are used are there, {found['hooks']} hooked"
        )
        yield Finding("symbols", OK, text)


def device(gather: Gather) -> Iterator[Finding]:
    """Accelerators, and how they fit the installed torch."""
    found = gather("device")
    if "failed" in found:
        remedy = "mend the installation until `python -c 'import torch'` works"
        yield Finding("device", FAULT, f"torch cannot be imported: {found['failed']}", remedy)
        return
    for d in found["devices"]:
        compute = ".".join(map(str, d["compute"]))
        text = f"{d['name']}, {amount(d['memory'])}, compute capability {compute}"
        yield Finding("device", OK, text)
    if found["devices"]:
        yield Finding(
            "device", NOTE, "no server has answered on a GPU yet, the kernels have: see README.md"
        )
        return
    if Path("/dev/nvidiactl").exists() or shutil.which("nvidia-smi"):
        yield Finding(
            "device",
            WARNING,
            f"a GPU's driver is here, but torch {found['torch']} (CUDA {found['cuda']}) sees none",
            "compare the driver's CUDA version (nvidia-smi) with torch's, and look at "
            "CUDA_VISIBLE_DEVICES",
        )
    elif found["portable_cpu"]:
        yield Finding("device", NOTE, "no accelerator: servers run on the CPU, in fp32")
    else:
        yield Finding(
            "device", NOTE, "no GPU; SGLang chooses another accelerator, or its CPU engine"
        )


def compiler(gather: Gather) -> Iterator[Finding]:
    """The CPU kernels, built where they are not yet."""
    found = gather("kernels")
    if "failed" in found:
        yield Finding("compiler", FAULT, f"the kernels: {found['failed']}", "mend the installation")
    elif found["built"]:
        where = found["compiler"] or "no compiler"
        yield Finding("compiler", OK, f"the CPU kernels are built ({where}) in {found['cache']}")
    else:
        missing = [n for n in ("compiler", "ninja") if not found[n]]
        names = {"compiler": "a C++ compiler", "ninja": "ninja"}
        text = "; ".join(found["said"]) or "the CPU kernels could not be built"
        yield Finding(
            "compiler",
            WARNING,
            text,
            f"install {' and '.join(names[n] for n in missing)} (g++, ninja-build)"
            if missing
            else "build failures end above; CXX names another compiler",
        )


def memory() -> Iterator[Finding]:
    """What this process's control groups leave, and what the server's own store would take."""
    from sgl_blend.engine.launch.own_store import default_memory

    free = available_memory()
    if free >= UNKNOWN:
        yield Finding("memory", NOTE, "the kernel does not say how much memory is free")
        return
    text = f"{amount(free)} free; a server's own store may take {amount(default_memory())} of it"
    if free < _MEMORY_BYTES:
        remedy = "free some, raise the container's limit, or give --blend-store-memory"
        yield Finding("memory", WARNING, text, remedy)
    else:
        yield Finding("memory", OK, text)


def disk(store_path: str | None, store_disk: str) -> Iterator[Finding]:
    """The cache folder; the folder of sockets; the store's disk, where one is named."""
    yield _folder("disk", "the cache", folders.cache_root(), _CACHE_BYTES, "SGL_BLEND_CACHE_DIR")
    try:
        folders.check_runtime_folder(folders.runtime_folder())
        yield Finding("disk", OK, f"sockets of stores lie in {folders.runtime_folder()}")
    except ConfigError as e:
        yield Finding("disk", FAULT, str(e), "as it says")
    if store_path:
        wanted = parse_size(store_disk)
        yield _folder("disk", "the store", Path(store_path), wanted, "--blend-store-disk-path")
        yield from _direct(Path(store_path))


def _folder(subject: str, what: str, path: Path, wanted: int, option: str) -> Finding:
    there = path.expanduser()
    while not os.path.exists(there):
        there = there.parent
    if not os.access(there, os.W_OK | os.X_OK):
        return Finding(
            subject,
            FAULT,
            f"{path} ({what}) cannot be written by this user",
            f"give it to the user who runs the server, or name another folder ({option})",
        )
    free = shutil.disk_usage(there).free
    text = f"{path} ({what}): {amount(free)} free"
    if free < wanted:
        remedy = f"make room for {amount(wanted)}, or name another folder ({option})"
        return Finding(subject, WARNING, text, remedy)
    return Finding(subject, OK, text)


def _direct(path: Path) -> Iterator[Finding]:
    """Can the file system be read past the page cache?"""
    from tempfile import NamedTemporaryFile

    if not os.path.isdir(path):
        return
    try:
        with NamedTemporaryFile(dir=path, prefix="sgl-blend-doctor-") as f:
            os.close(os.open(f.name, os.O_RDONLY | os.O_DIRECT))
    except OSError as e:
        yield Finding(
            "disk",
            WARNING,
            f"{path} cannot be read past the page cache ({e.strerror}): every byte is copied twice",
            "use a local file system that knows O_DIRECT (ext4, xfs), no tmpfs or overlay",
        )


def store(open_client: Callable[[], Any], asked: bool) -> Iterator[Finding]:
    """A chunk store at the usual address, or at the one asked for. asked: it must be there."""
    try:
        with open_client() as client:
            stats, where = client.stats(), client.endpoint
    except BlendError as e:
        if asked:
            remedy = "start it (sgl-blend store), or correct --at and the keys"
            yield Finding("store", FAULT, f"no store answers: {e}", remedy)
        else:
            yield Finding("store", NOTE, "no store runs by itself; a server starts its own")
        return
    text = f"{where}: {stats['chunks']:,} chunks, {amount(stats['memory_used'])} of "
    text += f"{amount(stats['memory_limit'])} in memory"
    if stats["disk_limit"]:
        text += f", {amount(stats['disk_used'])} of {amount(stats['disk_limit'])} on disk"
    yield Finding("store", OK, text)
    for bad, what, remedy in (
        (stats["read_only"], "it is read-only", "sgl-blend store read-only off"),
        (stats["draining"], "it takes no new chunks, it is being drained", "start it again"),
        (stats["shm_exhausted"], "it was refused shared memory", "raise the limit of its group"),
        (stats["counters"].get("corrupt"), "it has found damaged chunks", "look at its disk"),
    ):
        if bad:
            yield Finding("store", WARNING, what, remedy)
