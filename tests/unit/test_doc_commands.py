"""Commands that the documentation prints: options and arguments are there, and what needs no server
runs. CPU; those that need one are run in tests/server."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from monitoring import tool
from sglang.srt.server_args import ServerArgs
from sglang_router.launch_router import parse_router_args

from sgl_blend.cli.completion import SHELLS
from sgl_blend.cli.main import COMMANDS, main, make_parser
from sgl_blend.engine.launch.flags import add_cli_args

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
_BLOCK = re.compile(r"^```bash\n(.*?)^```", re.M | re.S)
#: what is typed behind the command, up to where its output goes
_COMMAND = re.compile(r"^(?:.*&& )?(?:\S*/)?sgl-blend (.*?)(?: [>|].*)?$")
_SERVER = "python -m sglang.launch_server "
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


def others() -> dict[str, list[str]]:
    """Every other command of docs/deployment.md, and each launch of a server on all pages."""
    found = {}
    for page in PAGES:
        for block in _BLOCK.findall(page.read_text()):
            for line in block.replace("\\\n", " ").splitlines():
                server = line.startswith(_SERVER)
                if server or (page.name == "deployment.md" and not _COMMAND.search(line)):
                    words = shlex.split(line, comments=True)
                    if words:
                        found[f"{page.name}: {' '.join(words)}"] = words
    return found


OTHERS = others()


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


def launched(words: list[str]) -> argparse.Namespace:
    """What a server's flags say. Raises SystemExit for an unknown one."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    ServerArgs.add_cli_args(parser)
    if "--enable-blend" not in parser.format_usage():
        add_cli_args(None, parser)
    return parser.parse_args(words)


@pytest.fixture(scope="module")
def keys(tmp_path_factory) -> set[str]:
    """The files that the keys' command writes."""
    folder = tmp_path_factory.mktemp("keygen") / "keys"
    assert main(["store", "keygen", str(folder)]) == 0
    return {f"keys/{path.relative_to(folder)}" for path in folder.rglob("*.key*")}


@pytest.mark.parametrize("name", OTHERS)
def test_another_command_is_understood(name, keys, monkeypatch):
    """By its own parser, or by what it names."""
    monkeypatch.chdir(ROOT)
    words = OTHERS[name]
    while "=" in words[0]:  # variables
        words = words[1:]
    files = [words[i + 1] for i, word in enumerate(words) if word == "-f"]
    assert all((ROOT / name).is_file() for name in files), files
    match words:
        case ["python", "-m", "sglang.launch_server", *flags]:
            assert launched(flags).enable_blend
        case ["python", "-m", "sglang_router.launch_router", *flags]:
            assert parse_router_args(flags).worker_urls
        case ["docker", "build", "-f", _, "-t", "sgl-blend", "."]:
            pass
        case ["docker", "compose", "-f", _, "up", "--detach"]:
            pass
        case ["kubectl", "apply", "-f", _]:
            pass
        case ["kubectl", "create", "secret", "generic", secret, *given]:
            named = [word.removeprefix("--from-file=") for word in given]
            assert set(named) <= keys, keys
            pods = (ROOT / "examples/deploy/kubernetes/shared-store.yaml").read_text()
            assert f"secretName: {secret}" in pods
        case ["promtool", "check", "config", config]:
            subprocess.run([tool("promtool"), *words[1:3], config], check=True)
        case ["promtool", "test", "rules", rules]:
            subprocess.run([tool("promtool"), *words[1:3], rules], check=True)
        case ["python", "examples/monitoring/dashboard.py"]:
            before = (ROOT / "examples/monitoring/dashboard.json").read_bytes()
            subprocess.run([sys.executable, words[1]], check=True)
            assert (ROOT / "examples/monitoring/dashboard.json").read_bytes() == before
        case ["python", "examples/benchmarks/serving.py", *flags]:
            spec = importlib.util.spec_from_file_location("serving", words[1])
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            assert module.make_parser().parse_args(flags).rounds
        case ["mooncake_master", flag]:
            # The tests' own masters are started with it.
            assert flag.partition("=")[0] in (ROOT / "tests" / "conftest.py").read_text()
        case _:
            pytest.fail(f"nothing here knows {words}")


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
