"""CUDA kernels that are built ahead of time: ``sgl-blend build``, and which library is used. Needs:
CPU, nvcc (once a machine, for one source and target; elsewhere scripts stand for it)."""

from __future__ import annotations

import json
import logging
import shutil
import stat
from pathlib import Path

import nvcc_once
import pytest
import torch

from sgl_blend.cli.main import main
from sgl_blend.errors import KernelError
from sgl_blend.ops import cuda_build, nvcc, prebuilt

OTHER = "kernels-0123456789abcdef.so"


@pytest.fixture
def folders(monkeypatch, tmp_path):
    """Nothing was built yet: what a wheel carries, and what this user has built."""
    nvcc_once.one_library()
    monkeypatch.setenv("SGL_BLEND_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(prebuilt, "CARRIED", tmp_path / "carried")
    cuda_build.cuda_module.cache_clear()
    yield prebuilt.CARRIED, prebuilt.own_folder()
    cuda_build.cuda_module.cache_clear()


@pytest.fixture
def no_nvcc(monkeypatch):
    monkeypatch.setattr(cuda_build, "find_nvcc", lambda: None)


@pytest.fixture
def compiler(monkeypatch, tmp_path):
    """A script that hands out the library; what it was asked for."""
    made = nvcc_once.pretended(tmp_path, nvcc_once.one_library().path)
    monkeypatch.setattr(cuda_build, "find_nvcc", lambda: made)
    said = tmp_path / "said"
    return lambda: said.read_text().splitlines() if said.exists() else []


def put(folder: Path, targets=("90a",), ptx=None, content: Path | None = None) -> Path:
    """A library of these sources."""
    folder.mkdir(parents=True, exist_ok=True)
    path = prebuilt.library_in(folder, cuda_build.sources_digest())
    shutil.copy(content or nvcc_once.one_library().path, path)
    prebuilt.write(prebuilt.Prebuilt(path, targets, ptx, "13.0.99"))
    return path


def refuses_the_cpu(module) -> bool:
    v, slots = torch.zeros(4, 1, 8, dtype=torch.bfloat16), torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match="tensors of a CUDA device"):
        module.v_deviation(v, slots, slots, torch.zeros(1))
    return True


def test_what_nvcc_makes_checks_its_device_and_needs_no_toolkit():
    import tvm_ffi

    made = nvcc_once.one_library()
    assert refuses_the_cpu(tvm_ffi.load_module(str(made.path)))
    content = made.path.read_bytes()
    assert b"libtvm_ffi.so" in content and b"libcudart.so" not in content


def test_build_makes_one_library_for_every_target(folders, compiler, capsys):
    assert main(["build", "--json"]) == 0
    out, err = capsys.readouterr()
    told = json.loads(out)
    library = prebuilt.library_in(folders[1], cuda_build.sources_digest())
    assert told["library"] == str(library) and told["bytes"] == library.stat().st_size
    assert told["targets"] == list(cuda_build.TARGETS) and told["nvcc"] == "13.0.99"
    assert all(name in err for name in cuda_build.SOURCES) and "linking" in err
    *compiled, link = [line for line in compiler() if " -o " in line and "--dryrun" not in line]
    assert len(compiled) == len(cuda_build.SOURCES)
    for line in compiled:
        codes = [word for word in line.split() if word.startswith("-gencode")]
        assert len(codes) == len(cuda_build.TARGETS) + 1
        assert codes[3] == "-gencode=arch=compute_90a,code=sm_90a"
        assert codes[-1] == f"-gencode=arch=compute_{cuda_build.PTX},code=compute_{cuda_build.PTX}"
    assert "-cudart static" in link and "-ltvm_ffi" in link
    assert {p.suffix for p in folders[1].glob("kernels*")} == {".so", ".json"}
    (found,) = prebuilt.find(cuda_build.sources_digest())
    assert found == prebuilt.Prebuilt(library, cuda_build.TARGETS, cuda_build.PTX, "13.0.99")


def test_build_for_some_targets_into_a_folder(folders, compiler, tmp_path, capsys):
    assert main(["build", "--into", str(tmp_path / "w"), "--targets", "sm_90a,80,ptx"]) == 0
    out = capsys.readouterr().out
    (library,) = (tmp_path / "w").glob("*.so")
    assert str(library) in out and "sm_90a sm_80 PTX" in out
    assert main(["build", "--into", str(tmp_path / "w"), "--targets", "120"]) == 0
    assert json.loads(library.with_suffix(".json").read_text())["targets"] == ["120"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--targets", "hopper"], "'hopper' names no architecture"),
        (["--targets", ","], "--targets is empty"),
        (["--into", "/dev/null/here"], "--into /dev/null/here"),
    ],
)
def test_build_says_what_it_cannot_do(folders, compiler, words, said, capsys):
    assert main(["build", *words]) == 2
    assert said in capsys.readouterr().err


def test_build_needs_nvcc(folders, no_nvcc, capsys):
    assert main(["build"]) == 2
    assert "no nvcc was found" in capsys.readouterr().err


def test_a_build_that_fails_leaves_no_library(folders, monkeypatch, tmp_path, capsys):
    refused = nvcc_once.pretended(tmp_path, refusal="unsupported gpu architecture")
    monkeypatch.setattr(cuda_build, "find_nvcc", lambda: refused)
    put(folders[1])
    assert main(["build"]) == 2
    assert "unsupported gpu architecture" in capsys.readouterr().err
    assert prebuilt.find(cuda_build.sources_digest()) == []
    assert not list(folders[1].glob("objects-*"))


def test_after_a_failure_no_other_source_is_compiled(monkeypatch, tmp_path):
    monkeypatch.setattr(nvcc, "_processors", lambda: 1)
    refused = nvcc_once.pretended(tmp_path, refusal="no such target")
    sources = [Path(f"{name}.cu") for name in "abcdef"]

    with pytest.raises(KernelError, match="no such target"):
        nvcc.compile_library(refused, sources, tmp_path / "a.so", [], [])
    calls = (tmp_path / "said").read_text().splitlines()
    assert len([line for line in calls if line.endswith(".o") and "--dryrun" not in line]) == 1


@pytest.mark.parametrize("where", [0, 1], ids=["wheel", "user"])
def test_a_library_serves_without_nvcc(folders, no_nvcc, where, caplog):
    put(folders[where])
    with caplog.at_level(logging.WARNING):
        assert refuses_the_cpu(cuda_build.cuda_module("90a"))
    assert caplog.records == []


def test_a_library_serves_before_nvcc_is_asked(folders, compiler):
    put(folders[0])
    assert refuses_the_cpu(cuda_build.cuda_module("90a"))
    assert compiler() == []


def test_nvcc_compiles_what_is_missing_alone(folders, compiler):
    put(folders[0], targets=("80",))
    assert refuses_the_cpu(cuda_build.cuda_module("90a"))
    codes = {w for line in compiler() for w in line.split() if w.startswith("-gencode")}
    assert codes == {"-gencode=arch=compute_90a,code=sm_90a"}
    asked = len(compiler())
    cuda_build.cuda_module.cache_clear()
    cuda_build.cuda_module("90a")
    assert [line for line in compiler()[asked:] if "--version" not in line] == []


def test_a_library_of_other_sources_is_not_used(folders, monkeypatch, no_nvcc, caplog):
    before = put(folders[0])
    monkeypatch.setattr(cuda_build, "FLAGS", (*cuda_build.FLAGS, "-DOTHER"))
    with caplog.at_level(logging.WARNING):
        assert cuda_build.cuda_module("90a") is cuda_build.cuda_module("90a") is None
    (record,) = caplog.records
    assert f"{before} was built from other sources" in record.getMessage()


def test_a_change_of_any_source_changes_the_digest(monkeypatch, tmp_path):
    shutil.copytree(cuda_build.source_dir(), tmp_path / "csrc")
    monkeypatch.setattr(cuda_build, "source_dir", lambda: tmp_path / "csrc")
    before = cuda_build.sources_digest()
    assert before == cuda_build.sources_digest()
    for path in sorted((tmp_path / "csrc" / "cuda").iterdir()):
        text = path.read_text()
        path.write_text(text + "\n")
        assert cuda_build.sources_digest() != before, path
        path.write_text(text)


@pytest.mark.parametrize("content", ["not a library", ""])
def test_a_library_that_cannot_be_loaded_is_left(folders, compiler, tmp_path, content):
    (tmp_path / "broken").write_text(content)
    put(folders[0], content=tmp_path / "broken")
    assert refuses_the_cpu(cuda_build.cuda_module("90a"))
    assert any("-shared" in line for line in compiler())


def test_without_both_there_is_one_warning_that_says_why(folders, no_nvcc, tmp_path, caplog):
    put(folders[1], targets=("80", "120"))
    with caplog.at_level(logging.WARNING):
        assert [cuda_build.cuda_module("90a") for _ in range(2)] == [None, None]
    (record,) = caplog.records
    assert "has code for sm_80, sm_120 alone" in record.getMessage()
    assert "sgl-blend build" in record.getMessage()


@pytest.mark.parametrize(
    ("targets", "ptx", "device", "served"),
    [
        (("80",), None, "80", True),
        (("80",), None, "86", True),  # a later one of the same generation
        (("86",), None, "80", False),
        (("80",), None, "90a", False),
        (("90a",), None, "90a", True),
        (("100a",), None, "103", False),  # "a": no other one
        (("100a",), "90", "103", True),
        (("120",), None, "121", True),
        (("80",), "90", "89", True),
        (("100a",), "90", "89", False),
        ((), "90", "90a", True),
    ],
)
def test_which_devices_a_library_serves(targets, ptx, device, served):
    assert prebuilt.Prebuilt(Path("x"), targets, ptx, "").serves(device) == served


def test_every_device_of_the_last_years_is_served():
    made = prebuilt.Prebuilt(Path("x"), cuda_build.TARGETS, cuda_build.PTX, "")
    for capability in [(8, 0), (8, 6), (8, 7), (8, 9), (9, 0), (10, 0), (10, 3), (11, 0), (12, 1)]:
        assert made.serves(cuda_build.target_of(capability)), capability
    assert not made.serves("75")


@pytest.mark.parametrize("name", ["9", "a90", "sm_90", ""])
def test_names_of_architectures(name):
    with pytest.raises(KernelError, match="names no architecture"):
        prebuilt.split(name)


def test_the_home_of_an_nvcc_that_a_script_calls(tmp_path):
    wrapper = nvcc_once.pretended(tmp_path)
    assert nvcc.cuda_home(wrapper) == tmp_path / "toolkit"
    wrapper.write_text("#!/bin/sh\nexit 1\n")
    assert nvcc.cuda_home(wrapper) == tmp_path.parent
    real = cuda_build.find_nvcc()
    assert (nvcc.cuda_home(real) / "bin" / "nvcc").is_file()


def test_the_toolkits_own_runtime_is_linked(tmp_path):
    """pip's lies in lib, of which its nvcc knows nothing."""
    runtime = tmp_path / "toolkit" / "lib" / "libcudart_static.a"
    runtime.parent.mkdir(parents=True)
    runtime.touch()
    made = nvcc_once.pretended(tmp_path)
    nvcc.compile_library(made, [Path("a.cu")], tmp_path / "a.so", [], [])
    assert f"-L{runtime.parent}" in (tmp_path / "said").read_text().splitlines()[-1].split()


def test_the_toolkit_that_is_named_comes_first(monkeypatch, tmp_path):
    (tmp_path / "bin").mkdir()
    named = nvcc_once.pretended(tmp_path / "bin")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert cuda_build.find_nvcc() == named
    named.chmod(stat.S_IRUSR)  # no program
    assert cuda_build.find_nvcc() != named


def test_an_nvcc_that_does_not_run_is_told(folders, monkeypatch, tmp_path, caplog):
    broken = tmp_path / "nvcc"
    broken.write_text("#!/bin/sh\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setattr(cuda_build, "find_nvcc", lambda: broken)
    with caplog.at_level(logging.WARNING):
        assert cuda_build.cuda_module("90a") is None
    (record,) = caplog.records
    assert "does not run" in record.getMessage()
