"""The correctness gate in real servers: broken builds, live samples. Needs: CPU, real servers."""

from __future__ import annotations

import json
import re
import time

import faults
import probe
import pytest
import requests
from polling import eventually
from talk import SEP, Docs, ask, check_report

from sgl_blend.harness import server as launcher

ON = ["--enable-blend", "--enable-metrics"]
OFF = "turned off by the correctness gate"


def metric(server, name: str, **labels: str) -> float | None:
    """The sum of a metric's samples whose labels fit; None where there are none."""
    text = requests.get(server.url + "/metrics", timeout=60).text
    found = []
    for line in re.findall(rf"^sgl_blend:{name}{{(.*)}} (\S+)$", text, re.M):
        has = dict(re.findall(r'(\w+)="([^"]*)"', line[0]))
        if all(has.get(k) == v for k, v in labels.items()):
            found.append(float(line[1]))
    return sum(found) if found else None


def test_a_broken_build_serves_as_plain_sglang_does(model, plain, start, tmp_path):
    """The same requests as of the unbroken server; answers are those of plain SGLang. Every fault
    is tried in process, with pages too, in ``tests/models/test_gate_models.py``."""
    server = start(model, ON, faults.install(tmp_path, "bottom_right_mask"))
    try:
        plain.flush()
        before = metric(server, "fallback_total", reason=OFF) or 0  # health checks
        d = Docs(120)
        prompts = [[1, *doc, SEP, *d.tokens(20)] for doc in d.docs]
        prompts += [d.prompt([i, (i + 2) % 6, (i + 3) % 6]) for i in range(4)]
        for p in prompts:
            a, b = ask(server, p), ask(plain, p)
            check_report(a)
            assert a.blend["fallback"] == OFF and a.blend["reused"] == a.blend["recomputed"] == 0
            assert a.blend["exact"] == a.meta["prompt_tokens"]
            assert a.tokens == b.tokens and a.logprobs == b.logprobs
        assert metric(server, "gate_state") == 0
        assert metric(server, "gate_failures_total", check="mask") == 1
        assert metric(server, "fallback_total", reason=OFF) == before + len(prompts)
        log = server.log.read_text()
        assert log.count("Blending is OFF") == 1
        assert "the correctness gate failed: mask: " in log
    finally:
        server.stop()


def test_a_broken_build_ends_the_launch_where_asked(model, start, tmp_path):
    with pytest.raises(launcher.ServerError) as e:
        start(model, [*ON, "--blend-gate", "fail"], faults.install(tmp_path, "values_rotated"))
    assert re.search(r"gate failed: values: layer \d's V of a (reused|moved) token", str(e.value))


def send(server, d: Docs, count: int, **more):
    """``count`` different blended prompts, one by one."""
    got = [ask(server, d.prompt([i % 6, (i + 1) % 6, (i + 4) % 6]), **more) for i in range(count)]
    for a in got:
        check_report(a)
    return got


@pytest.mark.parametrize("ranks", [1, 2])
def test_live_samples_find_a_sound_build_sound(model, start, tmp_path, ranks):
    """Every blended request is computed again while idle; answers, slots and tree stay."""
    idle = tmp_path / "idle.jsonl"
    env = probe.install(tmp_path / "probe", idle)
    args = [*ON, "--blend-gate-sample", "1", "--max-total-tokens", "16384"]
    args += ["--blend-gate-min-top1", "0"]  # with random weights, all tokens are near ties
    if ranks == 2:
        args += ["--tp-size", "2"]
    server = start(model, args, env)
    try:
        # One of several ranks exports, so that sums are of requests.
        assert metric(server, "gate_state") == 1
        d = Docs(121)
        d.warm(server)
        for i in range(20):
            [a] = send(server, d, 1)
            assert a.blend["reused"] > 100 and a.blend["ratio"] == 0.1
            assert eventually(
                lambda done=i + 1: metric(server, "gate_samples_total", outcome="compared") == done,
                60.0,
            )
        # Own ratios and exact requests are no samples.
        send(server, d, 3, custom={"blend_ratio": 0.3})
        send(server, d, 3, custom={"blend": False})
        moment = time.time()
        found = probe.last_after(idle, moment + 1)
        assert not found["leak"] and found["protected"] == found["locked_nodes"] == 0, found
        assert found["integrity"] is None
        assert metric(server, "gate_samples_total", outcome="compared") == 20
        assert metric(server, "gate_state") == 1
        assert 0 < metric(server, "gate_kl") < 0.5
        assert server.alive()
    finally:
        server.stop()


def test_live_samples_turn_blending_off(model, start):
    """A budget that nothing keeps: the launch raises the ratio, the samples end it."""
    args = [*ON, "--blend-gate-sample", "1", "--blend-gate-max-kl", "1e-9"]
    server = start(model, [*args, "--blend-gate-max-ratio", "0.2"])
    try:
        log = server.log.read_text()
        assert "The default ratio is now 0.2" in log
        d = Docs(122)
        d.warm(server)
        p = d.prompt([3, 1, 2])
        first = ask(server, p)
        assert first.blend["ratio"] == 0.2 == metric(server, "gate_ratio")
        found = eventually(lambda: send(server, d, 1)[0].blend["fallback"] == OFF, 60.0, every=0.3)
        assert found, "the samples did not turn blending off"
        assert metric(server, "gate_state") == 0
        assert metric(server, "gate_failures_total", check="live") == 1
        # Approximate KV of before is seen no more, not even by its own prompt.
        again = ask(server, p)
        assert again.blend["fallback"] == OFF and again.blend["exact"] == len(p)
        assert again.blend["prefix"] < 20
        assert server.log.read_text().count("Blending is OFF from now on") == 1
    finally:
        server.stop()


def test_prompts_of_the_operator_turn_blending_off(model, start, tmp_path):
    """With the launch ending where that is asked for, with the budget and what was measured."""
    path = tmp_path / "prompts.jsonl"
    text = "one two three four five six seven eight nine ten eleven twelve thirteen. "
    lines = [
        {"documents": [f"{i} {text}", f"{text}{i}", text * 2], "question": f"what is {i}?"}
        for i in range(3)
    ]
    path.write_text("".join(json.dumps(x) + "\n" for x in lines))
    args = [*ON, "--blend-gate-prompts", str(path), "--blend-gate-max-kl", "1e-9"]
    with pytest.raises(launcher.ServerError) as e:
        start(model, [*args, "--blend-gate", "fail", "--blend-policy", "none"])
    said = str(e.value)
    assert "the correctness gate failed: fidelity: gate_prompts: KL " in said
    assert "(3 prompts)" in said and "gate_max_kl 1e-09" in said
