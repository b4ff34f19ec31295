"""What pip installs. Runs on CPU; builds a wheel with the build backend that is installed."""

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

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
