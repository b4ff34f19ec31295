"""What a launch accepts, refuses and says; the launch command is the real one. Needs: CPU."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from talk import Docs, ask

from sgl_blend.engine import seams
from sgl_blend.harness import server as launcher
from sgl_blend.harness.models import ARCHITECTURES, make_model

SUPPORT = Path(__file__).parents[1] / "support"
ON = ["--enable-blend"]


def files(tmp: Path) -> dict[str, str]:
    """Configuration files by name."""
    texts = {
        "hurry.yaml": "drain_s: 1\n",
        "good.yaml": "recompute_ratio: 0.3\n",
        "misspelt.yaml": "recompute_ration: 0.3\n",
        "wrong.yaml": "recompute_ratio: lots\n",
        "broken.yaml": "a: [1\n",
        "list.yaml": "- 1\n",
        "server-bad.yaml": "enable-blend: true\nblend-policy: hkvdd\n",
        "server-off.yaml": "blend-policy: hkvd\n",
    }
    out = {"none.yaml": str(tmp / "none.yaml")}
    for name, text in texts.items():
        (tmp / name).write_text(text)
        out[name] = str(tmp / name)
    return out


#: name -> (arguments, environment, prelude, what the error line says); "<x.yaml>" and "<arch>"
#: stand for a file and for a model
REFUSED: dict[str, tuple[list[str], dict[str, str], str, list[str]]] = {
    "option without the switch": (
        ["--blend-policy", "hkvd"], {}, "", ["--blend-policy is given without --enable-blend"]),
    "file without the switch": (
        ["--blend-config", "<good.yaml>"], {}, "", ["--blend-config is given without"]),
    "option without the switch in SGLang's own file": (
        ["--config", "<server-off.yaml>"], {}, "", ["--blend-policy is given without"]),
    "unreadable file": (
        [*ON, "--blend-config", "<none.yaml>"], {}, "", ["<none.yaml>", "cannot be read"]),
    "unreadable file from the environment": (
        ON, {"SGL_BLEND_CONFIG": "<none.yaml>"}, "", ["<none.yaml>", "cannot be read"]),
    "misspelt key": (
        [*ON, "--blend-config", "<misspelt.yaml>"], {}, "",
        ["<misspelt.yaml>", "'recompute_ration'; did you mean 'recompute_ratio'?"]),
    "wrong type in the file": (
        [*ON, "--blend-config", "<wrong.yaml>"], {}, "",
        ["recompute_ratio", "'lots'", "expected float"]),
    "no YAML": ([*ON, "--blend-config", "<broken.yaml>"], {}, "", ["not valid YAML"]),
    "no mapping": ([*ON, "--blend-config", "<list.yaml>"], {}, "", ["must be a mapping, not list"]),
    "misspelt variable": (
        ON, {"SGL_BLEND_POLCY": "hkvd"}, "", ["SGL_BLEND_POLCY", "did you mean 'policy'?"]),
    "wrong value in a variable": (
        ON, {"SGL_BLEND_MAX_COPIES": "few"}, "", ["max_copies", "'few'"]),
    "switch variable that is no truth value": (
        [], {"SGL_BLEND_ENABLE": "perhaps"}, "", ["SGL_BLEND_ENABLE", "'perhaps'"]),
    "unknown policy": (
        [*ON, "--blend-policy", "hkvdd"], {}, "",
        ["unknown blend policy 'hkvdd'; did you mean 'hkvd'?"]),
    "unknown policy in SGLang's own file": (
        ["--config", "<server-bad.yaml>"], {}, "", ["unknown blend policy 'hkvdd'"]),
    "out of range": (
        [*ON, "--blend-recompute-ratio", "1.5"], {}, "", ["recompute_ratio is 1.5", "0..1"]),
    "coverage of a policy that has no score": (
        [*ON, "--blend-policy", "leading", "--blend-coverage", "0.9"], {}, "",
        ["coverage is 0.9", "'leading' has no score"]),
    "no number": (
        [*ON, "--blend-recompute-ratio", "lots"], {}, "", ["--blend-recompute-ratio", "'lots'"]),
    "check layer beyond the model": (
        [*ON, "--blend-check-layers", "1,3"], {}, "", ["check_layers is (1, 3)", "4 layers"]),
    "unknown gate": ([*ON, "--blend-gate", "maybe"], {}, "", ["gate is 'maybe'", "'disable'"]),
    "gate prompts that are not there": (
        [*ON, "--blend-gate-prompts", "<none.yaml>"], {}, "",
        ["gate_prompts", "<none.yaml>", "cannot be read"]),
    "gate prompts that are none": (
        [*ON, "--blend-gate-prompts", "<good.yaml>"], {}, "", ["<good.yaml>", "line 1"]),
    "another radix cache": (
        [*ON, "--radix-cache-backend", "lmcache"], {}, "", ["--radix-cache-backend lmcache"]),
    "speculative decoding with a draft model": (
        [*ON, "--speculative-algorithm", "EAGLE3", "--speculative-draft-model-path", "<model>"],
        {}, "", ["--speculative-algorithm EAGLE3", "NGRAM is served"]),
    "pipeline parallelism": ([*ON, "--pp-size", "2"], {}, "", ["pipeline parallelism"]),
    "DP attention": (
        [*ON, "--tp-size", "2", "--dp-size", "2", "--enable-dp-attention"], {}, "",
        ["a collective of all DP ranks"]),
    "experts' all-to-all": (
        [*ON, "--moe-a2a-backend", "deepep"], {}, "", ["--moe-a2a-backend deepep"]),
    "weights on the host": (
        [*ON, "--cpu-offload-gb", "1"], {}, "", ["--cpu-offload-gb 1", "where a pass was left"]),
    "a decode node that keeps prompts": (
        [*ON, "--disaggregation-mode", "decode", "--disaggregation-decode-enable-radix-cache"],
        {}, "",
        ["--disaggregation-decode-enable-radix-cache", "would keep blended KV as exact"]),
    "HiCache": ([*ON, "--enable-hierarchical-cache"], {}, "", ["HiCache"]),
    "no radix cache": ([*ON, "--disable-radix-cache"], {}, "", ["--disable-radix-cache"]),
    "embedding model": ([*ON, "--is-embedding"], {}, "", ["--is-embedding"]),
    "several at once are all named": (
        [*ON, "--disable-radix-cache", "--pp-size", "2"], {}, "",
        ["--disable-radix-cache", "pipeline parallelism"]),
    "a rotation that varies": (
        [*ON, "<dynamic>"], {}, "",
        ["LlamaForCausalLM cannot be blended: dynamic NTK rotations"]),
    "no model there": (
        [*ON, "--model-path", "/nowhere/at/all"], {}, "",
        ["--model-path /nowhere/at/all: there is nothing", "Name a folder"]),
    "no such model on the hub": (
        [*ON, "--model-path", "no-such-org/no-such-model"], {"HF_HUB_OFFLINE": "1"}, "",
        ["--model-path no-such-org/no-such-model cannot be read"]),
    "port in use": (
        ON, {},
        "import socket, sys\n"
        "s = socket.socket()\n"
        "s.bind(('127.0.0.1', int(sys.argv[sys.argv.index('--port') + 1])))\n"
        "s.listen()\n"
        "sys.kept_by_the_test = s\n",
        [" of 127.0.0.1 is in use", "choose another with --port"]),
    "a disk that another store holds": (
        [*ON, "--blend-store-disk-path", "<none.yaml>-disk",
         "--blend-store-config", "<hurry.yaml>"],
        {},
        "import sys\n"
        "from sgl_blend.store.config import load_config\n"
        "from sgl_blend.store.embedded import EmbeddedStore\n"
        "path = sys.argv[sys.argv.index('--blend-store-disk-path') + 1]\n"
        "sys.kept_by_the_test = EmbeddedStore(\n"
        "    load_config(None, disk_path=path, disk_bytes='1GiB', memory_bytes='64MiB'))\n",
        ["is held by another store", "Give each server a folder of its own",
         "--blend-store-endpoint"]),
    "another SGLang": (
        ON, {}, "import sgl_blend.engine.seams as s; s.version = lambda name: '0.5.24'",
        ["built for sglang 0.5.23, found 0.5.24"]),
    "a symbol is gone": (
        ON, {},
        "import sglang.srt.mem_cache.radix_cache as r; del r.RadixCache._delete_leaf",
        ["lacks sglang.srt.mem_cache.radix_cache.RadixCache._delete_leaf"]),
    "a hook is taken": (
        ON, {},
        "from sglang.srt.plugins.hook_registry import HookRegistry as H\n"
        "import sgl_blend.engine.seams as s\n"
        "H.register(s.VALIDATE_REQUEST, lambda *a: None)\n",
        ["_validate_one_request is already hooked"]),
}  # fmt: skip


@pytest.fixture(scope="module")
def outcomes(model, tmp_path_factory, child_env):
    """Outcome of each case of REFUSED, by name, and the files' paths."""
    tmp = tmp_path_factory.mktemp("launch")
    paths = files(tmp)
    paths["model"] = str(model)
    dynamic = make_model(tmp / "dynamic", "llama-dynamic", layers=4, hidden=64)

    def fill(text: str) -> str:
        for name, path in paths.items():
            text = text.replace(f"<{name}>", path)
        return text

    cases = []
    for args, env, prelude, _ in REFUSED.values():
        port = str(launcher.free_port())
        path = str(dynamic) if "<dynamic>" in args else str(model)
        args = [fill(a) for a in args if a != "<dynamic>"]
        common = ["--model-path", path, "--port", port]
        cases.append(
            {
                "args": [*common, *args],
                "env": {k: fill(v) for k, v in env.items()},
                "prelude": prelude,
            }
        )
    (tmp / "cases.json").write_text(json.dumps(cases))
    done = subprocess.run(
        [sys.executable, str(SUPPORT / "launches.py"), str(tmp / "cases.json")],
        env=child_env,
        stdout=subprocess.PIPE,
        check=True,
        timeout=900,
    )
    results = json.loads(done.stdout.splitlines()[-1])
    return dict(zip(REFUSED, results, strict=True)), fill


@pytest.mark.parametrize("name", REFUSED)
def test_a_wrong_launch_ends_with_one_clear_line(outcomes, name):
    results, fill = outcomes
    got = results[name]
    assert got["status"] not in (0, -14), got["output"][-2000:]
    assert "Traceback" not in got["output"], got["output"][-2000:]
    lines = [x for x in got["output"].splitlines() if "error:" in x]
    assert len(lines) == 1, got["output"][-2000:]
    for part in REFUSED[name][3]:
        assert fill(part) in lines[0]


def test_the_launch_command_itself_refuses(model, child_env):
    command = launcher.command(model, launcher.free_port(), ["--blend-policy", "hkvd"])
    done = subprocess.run(command, env=child_env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert "sgl-blend: error: --blend-policy is given without --enable-blend" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_layer_that_cannot_be_moved_ends_the_launch(tmp_path, start, monkeypatch):
    """Only the loaded model shows it: the scheduler process says so, and the launch ends."""
    monkeypatch.setitem(ARCHITECTURES, "gpt2", ("GPT2Config", {}))
    model = make_model(tmp_path / "gpt2", "gpt2", layers=4, hidden=64)
    with pytest.raises(launcher.ServerError) as e:
        start(model, [*ON, "--blend-gate", "off"])
    assert "ended with" in str(e.value) and "ended with 0" not in str(e.value)
    log = str(e.value)
    assert "GPT2LMHeadModel cannot be blended: layer 0: its values depend on the position" in log


def test_without_the_flag_nothing_is_hooked_and_the_tree_is_sglangs(plain):
    log = plain.log.read_text()
    hooked = set(re.findall(r"Applied \d+ hook\(s\) to (\S+)", log))
    ours = "sglang.srt.server_args.ServerArgs."
    # SGLang logs hooks from the moment logging is set up, which is after those on ServerArgs.
    # The portable CPU platform has one of its own, which makes latent attention run.
    known = {ours + "add_cli_args", ours + "from_cli_args", seams.ROPE_OF_LATENTS}
    assert hooked <= known, hooked
    tree = re.search(r"Tree cache initialized: .* impl=(\w+)", log)
    assert tree and "Blend" not in tree.group(1)
    assert "sgl-blend is on" not in log
    assert ask(plain, Docs(80).prompt([0])).blend is None


def test_with_the_flag_the_configuration_is_printed_once(blend):
    log = blend.log.read_text()
    assert log.count("sgl-blend is on: ") == 1
    assert "policy='query', recompute_ratio=0.1" in log
    assert "impl=BlendRadixCache" in log
