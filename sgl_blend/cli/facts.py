"""Facts that take heavy imports to find, or may end the process that looks: found in a child.

python -m sgl_blend.cli.facts KIND [ARGUMENT]    prints one line of JSON, the last
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from tempfile import TemporaryFile
from typing import Any

#: seconds that a child may take; building kernels on a slow machine takes a minute
PATIENCE_S = 300.0


def gather(kind: str, *arguments: str, waiting: Callable[[float], None]) -> dict[str, Any]:
    """The facts of ``kind``, found in a child. Where it failed: ``{"failed": its last line}``.

    waiting: is told the seconds so far, twice a second.
    """
    command = [sys.executable, "-W", "ignore", "-m", __name__, kind, *arguments]
    begun = time.monotonic()
    with TemporaryFile() as out, TemporaryFile() as err:
        with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=err) as child:
            try:
                while True:
                    waiting(time.monotonic() - begun)
                    try:
                        code = child.wait(0.5)
                        break
                    except subprocess.TimeoutExpired:
                        if time.monotonic() - begun > PATIENCE_S:
                            return {"failed": f"no answer in {PATIENCE_S:.0f} s"}
            finally:
                child.kill()
        out.seek(0)
        err.seek(0)
        said = out.read().decode(errors="replace").strip().splitlines()
        if code == 0 and said:
            found: dict[str, Any] = json.loads(said[-1])
            return found
        errors = err.read().decode(errors="replace").strip().splitlines()
        return {"failed": errors[-1] if errors else f"it ended with {code}"}


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

if __name__ == "__main__":
    warnings.simplefilter("ignore")
    facts = KINDS[sys.argv[1]](*sys.argv[2:])
    print("\n" + json.dumps(facts))
