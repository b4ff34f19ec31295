"""What pip installs. Runs on CPU; builds a wheel with the build backend that is installed."""

import os
import platform
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import nvcc_once

from sgl_blend.ops import cuda_build, prebuilt

ROOT = Path(__file__).resolve().parents[2]


def test_every_package_is_listed():
    listed = set(
        tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    )
    found = {
        ".".join(p.parent.relative_to(ROOT).parts)
        for p in (ROOT / "sgl_blend").rglob("__init__.py")
    }
    assert listed == found | {"sgl_blend.csrc"}


def test_wheel_carries_kernels_and_entry_points(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "uv", "build", "--wheel", "-q", "-o", str(tmp_path), str(ROOT)],
        check=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    carried = any((ROOT / "sgl_blend" / "_cuda").glob("*.so"))
    assert carried or wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as z:
        names = z.namelist()
        entry = next(n for n in names if n.endswith("entry_points.txt"))
        text = z.read(entry).decode()
    root = ROOT / "csrc"
    sources = {f"sgl_blend/csrc/{p.relative_to(root)}" for p in root.rglob("*") if p.is_file()}
    assert {p.rsplit(".", 1)[1] for p in sources} == {"cpp", "h", "cu", "cuh"}
    assert sources <= set(names)
    assert "sgl_blend.engine.plugin:register" in text
    assert "sgl_blend.engine.platform:activate" in text
    assert "sgl_blend.cli.main:main" in text


def test_importing_the_package_is_light():
    code = (
        "import sgl_blend, sys; print([m for m in ('torch', 'sglang', 'zmq') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert out.stdout.strip() == "[]"


def test_a_wheel_carries_the_library_that_was_built(tmp_path):
    """And what is installed from it finds it: its sources have the library's digest."""
    tree, installed = tmp_path / "tree", tmp_path / "installed"
    for name in ("sgl_blend", "csrc"):
        shutil.copytree(
            ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__", "_cuda")
        )
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    library = prebuilt.library_in(tree / "sgl_blend" / "_cuda", cuda_build.sources_digest())
    library.parent.mkdir(exist_ok=True)
    shutil.copy(nvcc_once.one_library().path, library)
    prebuilt.write(prebuilt.Prebuilt(library, ("90a",), None, "13.0.88"))
    uv = [sys.executable, "-m", "uv"]
    subprocess.run([*uv, "build", "--wheel", "-q", "-o", str(tmp_path), str(tree)], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith(f"-py3-none-linux_{platform.machine()}.whl")
    into = ["pip", "install", "-q", "--no-deps", "--target", str(installed), str(wheel)]
    subprocess.run([*uv, *into], check=True)
    code = (
        "from sgl_blend.ops import cuda_build; cuda_build.find_nvcc = lambda: None; "
        "print(cuda_build.__file__); print(cuda_build.cuda_module('90a').select_rows)"
    )
    environment = {**os.environ, "PYTHONPATH": str(installed), "SGL_BLEND_CACHE_DIR": str(tmp_path)}
    out = subprocess.run(
        [sys.executable, "-c", code],
        check=True, capture_output=True, text=True, env=environment, cwd=tmp_path,
    )  # fmt: skip
    where, function = out.stdout.splitlines()
    assert where.startswith(str(installed)) and "Function" in function
    assert "nvcc" not in out.stderr
