"""A distribution that SGLang finds as a plugin, made of one module. Needs: nothing."""

from __future__ import annotations

import os
import shutil
from pathlib import Path


def install(folder: Path, module: str, name: str) -> dict[str, str]:
    """Write a distribution ``name`` of the file ``module``, whose ``register`` SGLang calls in each
    of its processes; returns the environment that makes a server load it."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(module, folder / f"{name}.py")
    info = folder / f"{name}-0.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0\n")
    (info / "entry_points.txt").write_text(f"[sglang.srt.plugins]\n{name} = {name}:register\n")
    return {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    }
