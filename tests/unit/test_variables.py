"""Every environment variable that the code reads is known to the loader and documented. CPU."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from sgl_blend.config import BLEND, BlendConfig
from sgl_blend.store.config import STORE
from sgl_blend.variables import READ_BESIDE

ROOT = Path(__file__).resolve().parents[2]
REFERENCE = (ROOT / "docs" / "reference.md").read_text()
#: texts that look like a variable's name
LOOKS = re.compile(r"(SGL|SGLANG|OMP|GOMP|KMP|MKL|XDG|CUDA|TORCH|HF)_[A-Z_]*[A-Z]")


def _constants(tree: ast.Module) -> dict[str, str]:
    return {
        target.id: node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
        for target in node.targets
        if isinstance(target, ast.Name)
    }


def _read_by(tree: ast.Module) -> set[str]:
    """Names of variables in ``environ.get(X)``, ``environ[X]``, ``environ.pop(X)``, ``getenv(X)``,
    and every text that looks like one. A name that is made up elsewhere must look like one."""
    constants = _constants(tree)
    texts = {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant)}
    looking = {t for t in texts if isinstance(t, str) and LOOKS.fullmatch(t)}
    found = set(looking)
    for node in ast.walk(tree):
        name = None
        if isinstance(node, ast.Call) and node.args:
            called = ast.unparse(node.func)
            if called.endswith(("environ.get", "environ.pop", "environ.setdefault", "getenv")):
                name = node.args[0]
        elif isinstance(node, ast.Subscript) and ast.unparse(node.value).endswith("environ"):
            name = node.slice
        if isinstance(name, ast.Constant):
            found.add(name.value)
        elif isinstance(name, ast.Name) and name.id in constants:
            found.add(constants[name.id])
        elif name is not None:
            assert looking, f"{ast.unparse(node)}: which variable is read?"
    return found


def variables() -> set[str]:
    found: set[str] = set()
    for path in [*(ROOT / "sgl_blend").rglob("*.py"), *(ROOT / "examples").rglob("*.py")]:
        found |= _read_by(ast.parse(path.read_text()))
    for path in (p for p in (ROOT / "csrc").rglob("*") if p.is_file()):
        found |= set(re.findall(r'getenv\(\s*"([^"]+)"', path.read_text()))
    return found


READ = variables()
KNOWN = {
    prefix + name
    for options in (BLEND, STORE)
    for prefix in options.prefixes
    for name in (*options.others, *(o.name.upper() for o in options.options))
}


def test_the_search_finds_what_is_there():
    assert {"SGL_BLEND_CACHE_DIR", "SGL_BLEND_ENABLE", "CXX", "XDG_RUNTIME_DIR"} <= READ


@pytest.mark.parametrize("name", sorted(READ))
def test_every_variable_that_is_read_is_known_and_documented(name):
    assert name in KNOWN or name in READ_BESIDE
    assert f"`{name}`" in REFERENCE


@pytest.mark.parametrize("options", [BLEND, STORE], ids=["blend", "store"])
def test_variables_that_are_no_options_do_not_end_the_launch(options):
    for prefix in options.prefixes:
        for name in options.others:
            if name != "CONFIG":
                assert options.load(environ={prefix + name: "1"}) == options.cls()


def test_the_folder_of_the_kernels_may_be_moved_while_blending_is_on():
    """It ended the launch as an unknown option."""
    environ = {"SGL_BLEND_CACHE_DIR": "/somewhere", "SGL_BLEND_ENABLE": "1"}
    assert BLEND.load(environ=environ) == BlendConfig()
