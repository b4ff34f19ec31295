"""LoRA adapters through a real server: reuse within an adapter, none between them. Needs: CPU."""

from __future__ import annotations

import pytest
import requests
import unpinned
from model_support.adapters import make_adapter
from talk import Docs, all_at_once, ask, check_report, check_same

EXACT = {"blend": False}
ALL = {"blend_policy": "all"}


@pytest.fixture(scope="module")
def adapters(model):
    return [make_adapter(model, i) for i in range(2)]


@pytest.fixture(scope="module")
def served(model, adapters, start, tmp_path_factory):
    args = ["--enable-blend", "--enable-lora", "--lora-backend", "torch_native"]
    args += ["--max-lora-rank", "4", "--lora-paths"]
    args += [f"a{i}={path}" for i, path in enumerate(adapters)]
    return start(model, args, unpinned.install(tmp_path_factory.mktemp("plugin")))


def _post(server, path: str, **body) -> None:
    answer = requests.post(server.url + path, json=body, timeout=120)
    assert answer.status_code == 200, answer.text


def test_each_adapters_requests_are_blended_from_its_own_documents(served):
    docs = Docs(70)
    names = ("a0", "a1", None)
    for name in names[:2]:
        docs.warm(served, lora_path=name)
    prompt = docs.prompt([2, 0, 4])
    exact = [ask(served, prompt, custom=EXACT, lora_path=n) for n in names]
    assert len({tuple(a.logprobs) for a in exact}) == 3, "the adapters do nothing"
    # Who has asked for exact KV has computed it: everything but the prefix, on its own.
    found = [0, 0, 0]
    for custom in (ALL, {}):
        prompts = [docs.prompt([3, 1, 5]) for _ in names]
        jobs = [
            lambda p=p, n=n, c=custom: ask(served, p, custom=c, lora_path=n)
            for p, n in zip(prompts, names, strict=True)
        ]
        answers = all_at_once(jobs)
        for i, answer in enumerate(answers):
            check_report(answer)
            assert answer.blend["fallback"] is None
            found[i] += answer.blend["reused"] + answer.blend["recomputed"]
        if custom is ALL:
            for p, n, answer in zip(prompts, names, answers, strict=True):
                check_same(answer, ask(served, p, custom=EXACT, lora_path=n))
    assert found[0] > 300 and found[1] > 300
    assert served.alive()


def test_the_base_model_finds_nothing_of_an_adapters(served):
    served.flush()
    docs = Docs(71)
    docs.warm(served, lora_path="a0")
    prompt = docs.prompt([0, 1, 2])
    for name in (None, "a1"):
        answer = ask(served, prompt, lora_path=name)
        assert answer.blend["reused"] == 0 and answer.blend["prefix"] <= 1, answer.blend
        check_same(answer, ask(served, prompt, custom=EXACT, lora_path=name))
    assert ask(served, prompt, lora_path="a0").blend["reused"] > 0


def test_a_reloaded_adapter_finds_nothing_of_the_old_one(served, adapters):
    served.flush()
    docs = Docs(72)
    docs.warm(served, lora_path="a0")
    prompt = docs.prompt([0, 1, 2])
    assert ask(served, prompt, lora_path="a0").blend["reused"] > 0
    _post(served, "/unload_lora_adapter", lora_name="a0")
    _post(served, "/load_lora_adapter", lora_name="a0", lora_path=str(adapters[1]))
    answer = ask(served, prompt, lora_path="a0")
    assert answer.blend["reused"] == 0 and answer.blend["prefix"] <= 1, answer.blend
    check_same(answer, ask(served, prompt, custom=EXACT, lora_path="a1"))
