"""Names of files that no file system takes, and of results that cannot be written, are said in one
line. CPU, no server."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest

from sgl_blend.cli import checkup
from sgl_blend.cli.documents import read_documents
from sgl_blend.cli.kv_size import read_config
from sgl_blend.cli.main import main
from sgl_blend.cli.targets import check_target
from sgl_blend.engine.launch.checks import check_model_path
from sgl_blend.errors import BlendError
from sgl_blend.eval.datasets import find_files, load

#: longer than a name may be: the system's error is another one than "there is none"
LONG = "/" + 300 * "x"


@pytest.mark.parametrize(
    "look",
    [
        read_config,
        check_model_path,
        lambda name: [load(path) for path in find_files([Path(name)])],
    ],
)
def test_a_name_that_is_too_long_is_an_error_of_ours(look):
    with pytest.raises(BlendError, match="xxx"):
        look(LONG)


def test_a_document_with_such_a_name_is_one_that_cannot_be_read():
    (one,) = read_documents([LONG])
    assert "too long" in one.problem and not one.text


def test_standard_input_that_is_no_text_is_a_document_that_cannot_be_read(monkeypatch):
    bad = io.TextIOWrapper(io.BytesIO(b"\xff\xfe"), encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", bad)
    (one,) = read_documents(["-"])
    assert one.source == "-" and "cannot be read" in one.problem


def test_the_doctor_looks_at_the_nearest_folder_that_is_there(tmp_path):
    *_, found = checkup.disk(str(tmp_path / (300 * "x")), "1MiB")
    assert found.level == checkup.OK and "free" in found.text


EVAL = ("eval", "--model", "nowhere")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("bench", "--json", "{tmp}"), "--json {tmp} cannot be written: it is a folder"),
        (("bench", "--json", "{tmp}/file/a.json"), "{tmp}/file is no folder"),
        ((*EVAL, "--json", "{tmp}"), "--json {tmp} cannot be written: it is a folder"),
        ((*EVAL, "--markdown", "{tmp}"), "--markdown {tmp} cannot be written"),
        ((*EVAL, "--plot", "{tmp}/file/p/q.png"), "--plot {tmp}/file/p/q.png cannot be written"),
        ((*EVAL, "--out", "{tmp}/file"), "--out {tmp}/file cannot be written: it is no folder"),
    ],
)
def test_results_that_cannot_be_written_are_said_before_hours_of_measuring(
    words, said, tmp_path, capsys
):
    (tmp_path / "file").touch()
    assert main([word.format(tmp=tmp_path) for word in words]) == 2
    err = capsys.readouterr().err
    assert said.format(tmp=tmp_path) in err and err.count("\n") == 1


def test_results_that_can_be_written(tmp_path):
    (tmp_path / "old.json").touch()
    for path in (None, tmp_path / "old.json", tmp_path / "a" / "b.json", Path("here.json")):
        check_target("--json", path)
    for path in (tmp_path, tmp_path / "new"):
        check_target("--out", path, folder=True)
