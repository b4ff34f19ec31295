"""How the C++ kernels are found, built, and what they check by themselves. Runs on the CPU.

Needs a C++ compiler with ninja: without one the kernels under test would be the references
themselves, so the first test fails rather than passes.
"""

from __future__ import annotations

import logging

import pytest
import torch
from kernels import CPU, attention_args, close

from sgl_blend import ops
from sgl_blend.errors import KernelError
from sgl_blend.ops import build


def test_the_compiled_kernels_are_what_is_tested():
    assert build.cpu_module(CPU) is not None


def test_the_kernels_check_what_python_checks(monkeypatch):
    """A wrong slot that slipped past Python is refused, not read."""
    monkeypatch.setattr("sgl_blend.ops.checks.in_range", lambda *args: None)
    with pytest.raises(KernelError, match="outside"):
        ops.row_attention(**attention_args(kv_slots=torch.tensor([0, 10**9])))
    with pytest.raises(KernelError, match="outside"):
        ops.v_deviation(torch.randn(4, 1, 8), torch.tensor([0]), torch.tensor([-5]))


@pytest.mark.parametrize("compiled", [True, False], ids=["kernel", "reference"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kv_slots": torch.arange(11, 21)}, "kv_slots|outside its cache"),
        ({"kv_slots": torch.arange(-1, 9)}, "kv_slots|outside its cache"),
        ({"q_pos": torch.tensor([9, 8, 7])}, "q_pos must be ascending"),
    ],
)
def test_values_are_checked_once_by_whichever_runs(monkeypatch, compiled, changes, message):
    """The kernel looks at every slot; Python looks only for the reference."""
    looked = []
    for name in ("in_range", "ascending"):
        real = getattr(ops.checks, name)
        monkeypatch.setattr(ops.checks, name, lambda *a, f=real: looked.append(a) or f(*a))
    if not compiled:
        monkeypatch.setattr("sgl_blend.ops.attention.cpu_module", lambda device: None)
    with pytest.raises(KernelError, match=message):
        ops.row_attention(**attention_args(**changes))
    assert bool(looked) is not compiled


def test_without_a_compiler_torch_takes_over_with_one_warning(monkeypatch, caplog):
    args = attention_args()
    want = ops.row_attention(**args)
    build._load.cache_clear()
    monkeypatch.setattr(build.shutil, "which", lambda name, path=None: None)
    try:
        with caplog.at_level(logging.WARNING):
            for _ in range(2):
                close(ops.row_attention(**args), want)
        assert sum("fall back to torch" in r.getMessage() for r in caplog.records) == 1
    finally:
        build._load.cache_clear()


def test_sources_are_found_inside_and_beside_the_package(monkeypatch, tmp_path):
    for place in ("site/sgl_blend/csrc", "checkout/csrc"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "row_attention.cpp").touch()
    monkeypatch.setattr(build, "_PACKAGE", tmp_path / "site" / "sgl_blend")
    assert build.source_dir() == tmp_path / "site" / "sgl_blend" / "csrc"
    monkeypatch.setattr(build, "_PACKAGE", tmp_path / "checkout" / "sgl_blend")
    assert build.source_dir() == tmp_path / "checkout" / "csrc"
    monkeypatch.setattr(build, "_PACKAGE", tmp_path / "nowhere" / "sgl_blend")
    with pytest.raises(KernelError, match="reinstall"):
        build.source_dir()
