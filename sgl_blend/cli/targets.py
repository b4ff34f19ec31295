"""Files and folders that a command writes at its end, looked at before it begins."""

from __future__ import annotations

import os
from pathlib import Path

from sgl_blend.errors import ConfigError


def check_target(option: str, path: Path | None, folder: bool = False) -> None:
    """Raises ConfigError where ``option`` names what cannot be written: said before an hour of
    measuring rather than after it. folder: it is to be one."""
    if path is None:
        return
    wrong = "is no folder" if folder else "is a folder"
    if os.path.lexists(path) and os.path.isdir(path) is not folder:
        raise ConfigError(f"{option} {path} cannot be written: it {wrong}")
    there = path
    while not os.path.lexists(there):
        there = there.parent
    if there != path and not os.path.isdir(there):
        raise ConfigError(f"{option} {path} cannot be written: {there} is no folder")
    if not os.access(there, os.W_OK):
        raise ConfigError(f"{option} {path} cannot be written: {there} is not yours to write")
