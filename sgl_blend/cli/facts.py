"""Facts that take heavy imports to find, or may end the process that looks: found in a child.

python -m sgl_blend.cli.facts KIND[=ARGUMENT]...    prints a line of JSON for each
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from tempfile import TemporaryFile
from typing import Any

#: seconds that a child may take; building kernels on a slow machine takes a minute
PATIENCE_S = 300.0
#: what begins a line of facts; libraries print what they like
_MARK = "sgl-blend facts: "


class Facts:
    """One child that finds all ``kinds`` (``KIND`` or ``KIND=ARGUMENT``), in that order."""

    def __init__(self, kinds: Sequence[str]) -> None:
        self._found: dict[str, dict[str, Any]] = {}
        self._out, self._err = TemporaryFile(), TemporaryFile()
        command = [sys.executable, "-W", "ignore", "-m", __name__, *kinds]
        self._begun = time.monotonic()
        self._child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=self._out, stderr=self._err
        )

    def get(self, kind: str, waiting: Callable[[float], None]) -> dict[str, Any]:
        """The facts of ``kind``, once they are there; ``{"failed": why}`` where it ended in an
        error, or took the child with it. waiting: is told the seconds so far, twice a second."""
        while kind not in self._found:
            passed = time.monotonic() - self._begun
            ended = self._child.poll() is not None
            self._read()
            if kind in self._found:
                break
            if ended or passed > PATIENCE_S:
                return {"failed": self._last() if ended else f"no answer in {PATIENCE_S:.0f} s"}
            waiting(passed)
            try:
                self._child.wait(0.5)
            except subprocess.TimeoutExpired:
                continue
        return self._found[kind]

    def _read(self) -> None:
        self._out.seek(0)
        for line in self._out.read().decode(errors="replace").splitlines(keepends=True):
            if line.startswith(_MARK) and line.endswith("\n"):
                self._found |= json.loads(line.removeprefix(_MARK))

    def _last(self) -> str:
        self._err.seek(0)
        said = self._err.read().decode(errors="replace").strip().splitlines()
        return said[-1] if said else f"it ended with {self._child.returncode}"

    def __enter__(self) -> Facts:
        return self

    def __exit__(self, *_exc: object) -> None:
        self._child.kill()
        self._child.wait()
        self._out.close()
        self._err.close()


def device() -> dict[str, Any]:
    """torch, and the accelerators that it sees."""
    import torch

    from sgl_blend.engine.platform import activate

    devices = []
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        p = torch.cuda.get_device_properties(i)
        devices.append({"name": p.name, "memory": p.total_memory, "compute": [p.major, p.minor]})
    return {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "devices": devices,
        "portable_cpu": activate() is not None,
    }


def kernels() -> dict[str, Any]:
    """Compiler, and whether the CPU kernels are there or can be built; what was logged if not."""
    import torch

    from sgl_blend.folders import cache_root
    from sgl_blend.ops import build

    said: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    logging.getLogger(build.__name__).addHandler(Keep())
    compiler, ninja = build.tools()
    built = build.cpu_module(torch.device("cpu")) is not None
    return {
        "compiler": compiler,
        "ninja": ninja,
        "built": built,
        "said": said,
        "cache": str(cache_root()),
    }


def symbols() -> dict[str, Any]:
    """What of SGLang does not fit."""
    from sgl_blend.engine import seams
    from sgl_blend.engine.sglang_symbols import OVERRIDDEN, USED

    named = {*seams.HOOKS, *USED, *OVERRIDDEN}
    return {"problems": list(seams.problems()), "symbols": len(named), "hooks": len(seams.HOOKS)}


def model(path: str) -> dict[str, Any]:
    """What a model's configuration tells: its class, and why it would be refused."""
    from sglang.srt.utils.hf_transformers.config import get_config

    from sgl_blend.engine.launch import checks
    from sgl_blend.engine.launch.families import family_problems

    checks.check_model_path(path)
    config = get_config(path, False)
    text = config.get_text_config()
    name = (getattr(config, "architectures", None) or ["?"])[0]
    return {
        "class": name,
        "tested": name in checks.TESTED_MODELS | checks.TESTED_MEDIA,
        "layers": getattr(text, "num_hidden_layers", None),
        "problems": [*family_problems(config), *checks.model_problems(text)],
    }


KINDS: dict[str, Callable[..., dict[str, Any]]] = {
    f.__name__: f for f in (device, kernels, symbols, model)
}


def found(request: str) -> dict[str, Any]:
    """What ``KIND`` or ``KIND=ARGUMENT`` asks for, or why it failed."""
    kind, _, argument = request.partition("=")
    try:
        return KINDS[kind](*([argument] if argument else []))
    except Exception as e:
        return {"failed": f"{type(e).__name__}: {e}"}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    for request in sys.argv[1:]:
        print("\n" + _MARK + json.dumps({request.partition("=")[0]: found(request)}), flush=True)
