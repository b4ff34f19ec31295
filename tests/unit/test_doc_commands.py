"""Commands that the documentation prints: options and arguments are there, and what needs no server
runs. CPU; those that need one are run in tests/server."""

from __future__ import annotations

import contextlib
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from sgl_blend.cli.completion import SHELLS
from sgl_blend.cli.main import COMMANDS, main, make_parser

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
_BLOCK = re.compile(r"^```bash\n(.*?)^```", re.M | re.S)
#: what is typed behind the command, up to where its output goes
_COMMAND = re.compile(r"^(?:.*&& )?(?:\S*/)?sgl-blend (.*?)(?: [>|].*)?$")
#: commands that end by themselves, in seconds, without a server
_QUICK = ("size", "completion")


def printed() -> dict[str, list[str]]:
    """``page: command`` -> its words, of all blocks of shell commands; continued lines joined."""
    found = {}
    for page in PAGES:
        for block in _BLOCK.findall(page.read_text()):
            for line in block.replace("\\\n", " ").splitlines():
                said = _COMMAND.search(line)
                if said is not None:
                    words = shlex.split(said[1], comments=True)
                    found[f"{page.name}: {' '.join(words)}"] = words
    return found


PRINTED = printed()


def test_they_are_found():
    assert {"size", "completion", "doctor", "top"} <= {words[0] for words in PRINTED.values()}


@pytest.mark.parametrize("name", PRINTED)
def test_its_options_are_there(name):
    args = make_parser().parse_args(PRINTED[name])
    assert args.command in COMMANDS and callable(args.run)


@pytest.mark.parametrize("name", [n for n, words in PRINTED.items() if words[0] in _QUICK])
def test_it_runs(name, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = PRINTED[name]
    if "--device-memory" in words:  # the model that is shipped has its weights beside it
        assert list((ROOT / words[1]).glob("*.safetensors"))
    assert main(words) == 0
    assert capsys.readouterr().out


@pytest.mark.parametrize("shell", SHELLS)
def test_completion_knows_every_command(shell, capsys):
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert {c for c in COMMANDS if c not in script} == set()
    if shell == "bash":
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def test_bash_completes_options_of_a_command(tmp_path):
    """As bash does it: the completion function is asked for words."""
    script = tmp_path / "completion"
    with script.open("w") as out, contextlib.redirect_stdout(out):
        assert main(["completion", "bash"]) == 0
    ask = f"""
    source {shlex.quote(str(script))}
    COMP_WORDS=(sgl-blend size --kv) COMP_CWORD=2
    $(complete -p sgl-blend | sed 's/.*-F \\([^ ]*\\) .*/\\1/')
    echo "${{COMPREPLY[@]}}"
    """
    run = subprocess.run(["bash", "-c", ask], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["--kv-cache-dtype"], run.stderr
