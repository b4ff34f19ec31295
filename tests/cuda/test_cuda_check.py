"""A device's kernels are compared with torch before they are used, and built with nvcc. CPU: the
emulator takes the device's place."""

from __future__ import annotations

import logging

import emulated
import pytest
import torch

from sgl_blend.errors import KernelError
from sgl_blend.ops import cuda_build, cuda_check, prebuilt

CPU = torch.device("cpu")


class Wrong:
    """The emulated module, one launcher of which does nothing."""

    def __init__(self, name):
        self.name = name

    def __getattr__(self, name):
        return (lambda *args: None) if name == self.name else getattr(emulated.kernels(), name)


def test_right_kernels_pass():
    assert cuda_check.differing(emulated.kernels(), CPU) == {}


@pytest.fixture
def poisoned():
    """Memory that is handed out empty holds no results of the test before."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("name", cuda_check.LAUNCHERS)
def test_wrong_kernels_are_named(poisoned, name):
    """Parts are joined by a kernel of their own: either may be the cause."""
    found = cuda_check.differing(Wrong(name), CPU)
    allowed = {name, "join_parts", "row_attention"}
    assert found[name] and set(found) <= allowed | {"latent_attention"}


class WrongFor128:
    """The emulated module; for heads of 128, which are code of their own, some launchers do
    nothing."""

    def __getattr__(self, name):
        launcher = getattr(emulated.kernels(), name)
        if name not in ("row_attention", "attention_mass"):
            return launcher
        return lambda q, *args: None if q.shape[-1] == 128 else launcher(q, *args)


def test_every_head_size_is_tried(poisoned):
    found = cuda_check.differing(WrongFor128(), CPU)
    kinds = ("attention_mass", "row_attention", "row_attention in parts, join_parts")
    types = ("bfloat16", "float16")
    cases = [f"{kind}, heads of 128, torch.{dtype}" for dtype in types for kind in kinds]
    assert found == {
        "attention_mass": [x for x in cases if x.startswith("attention_mass")],
        "row_attention": [x for x in cases if x.startswith("row_attention")],
        "join_parts": [x for x in cases if "join_parts" in x],
    }


@pytest.fixture
def device(monkeypatch):
    """Where ``kernels`` looks for a device of sm_90. Nothing was built ahead of time."""
    monkeypatch.setattr(prebuilt, "find", lambda digest: [])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a device")
    caches = cuda_build._checked, cuda_build.cuda_module
    for cache in caches:
        cache.cache_clear()
    yield torch.device("cuda")
    for cache in caches:
        cache.cache_clear()


def test_only_right_kernels_are_used(monkeypatch, device, caplog):
    asked = []
    monkeypatch.setattr(cuda_build, "cuda_module", asked.append)
    monkeypatch.setattr(cuda_build, "differing", lambda module, device: {})
    assert cuda_build.kernels(CPU) is None and asked == []
    assert cuda_build.kernels(device) is None and asked == ["90a"]

    module = emulated.kernels()
    cuda_build._checked.cache_clear()
    monkeypatch.setattr(cuda_build, "cuda_module", lambda target: module)
    assert cuda_build.kernels(device) is module

    cuda_build._checked.cache_clear()
    wrong = {"select_rows": ["select_rows"], "join_parts": ["row_attention in parts, join_parts"]}
    monkeypatch.setattr(cuda_build, "differing", lambda module, device: wrong)
    with caplog.at_level(logging.WARNING):
        assert cuda_build.kernels(device, "select_rows") is None
        assert cuda_build.kernels(device, "row_attention", "join_parts") is None
        assert cuda_build.kernels(device, "rotate_copy") is module
    (record,) = caplog.records
    said = "other results than torch on a device (select_rows; row_attention in parts, join_parts)"
    assert said in record.getMessage()


@pytest.mark.parametrize("error", [KernelError("no kernel image"), RuntimeError("no kernel image")])
def test_kernels_that_do_not_run_are_left(monkeypatch, device, caplog, error):
    """As where the driver cannot translate a library's PTX."""

    def launch(module, device):
        raise error

    monkeypatch.setattr(cuda_build, "cuda_module", lambda target: emulated.kernels())
    monkeypatch.setattr(cuda_build, "differing", launch)
    with caplog.at_level(logging.WARNING):
        assert [cuda_build.kernels(device) for _ in range(2)] == [None, None]
    (record,) = caplog.records
    assert "do not run on a device" in record.getMessage()
    assert "no kernel image" in record.getMessage()


def test_without_nvcc_torch_takes_over_with_one_warning(monkeypatch, device, caplog):
    monkeypatch.setattr(cuda_build, "find_nvcc", lambda: None)
    with caplog.at_level(logging.WARNING):
        assert [cuda_build.kernels(device) for _ in range(2)] == [None, None]
    (record,) = caplog.records
    assert "No nvcc found" in record.getMessage()


def test_what_nvcc_says_is_reported(monkeypatch, device, caplog, tmp_path):
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && exit 0\necho "no such target" >&2; exit 1\n'
    )
    nvcc.chmod(0o755)
    monkeypatch.setattr(cuda_build, "find_nvcc", lambda: nvcc)
    monkeypatch.setenv("SGL_BLEND_CACHE_DIR", str(tmp_path))
    with caplog.at_level(logging.WARNING):
        assert cuda_build.kernels(device) is None
    (record,) = caplog.records
    assert "sm_90a" in record.getMessage() and "no such target" in record.getMessage()


@pytest.mark.parametrize(
    ("capability", "target"),
    [((8, 0), "80"), ((8, 6), "86"), ((8, 9), "89"), ((9, 0), "90a"), ((10, 0), "100a"),
     ((12, 0), "120"), ((12, 1), "121")],
)  # fmt: skip
def test_targets_are_named_as_nvcc_does(capability, target):
    assert cuda_build.target_of(capability) == target
    assert capability == (12, 1) or target in cuda_build.TARGETS
