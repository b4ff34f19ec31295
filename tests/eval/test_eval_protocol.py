"""The order in which ``sgl-blend eval`` asks, before a client that answers from a script. Needs:
CPU. The protocol through a real server is tested in ``tests/server/test_eval_server.py``."""

import itertools
import math

import pytest

from sgl_blend.errors import ConfigError
from sgl_blend.eval.client import Client, Reply, Wanted
from sgl_blend.eval.cost import NoReportError, Tokens
from sgl_blend.eval.encoding import Encoder
from sgl_blend.eval.fidelity import Output
from sgl_blend.eval.probes import Probe, Prompt, Reference, Step, Suite, warmup
from sgl_blend.eval.runner import Runner, RunOptions
from sgl_blend.eval.settings import plan


class ScriptedClient(Client):
    """A stand-in for a server: notes what it is asked, and answers one token after a cost that
    depends on the policy. The first ``lost`` answers to blended requests lose their report."""

    COSTS = {"none": 0.1, "query": 0.4, "random": 0.4}

    def __init__(self, lost=0):
        super().__init__("http://127.0.0.1:9")
        self.log = []
        self.lost = lost

    def flush(self):
        self.log.append("flush")

    def warm(self, prompts, custom, salt=None):
        for _, one in zip(prompts, custom, strict=True):
            self.log.append((one, Wanted(), salt, 1))

    def ask(self, ids, *, custom, max_new_tokens, wanted=None, salt=None):
        self.log.append((custom, wanted, salt, max_new_tokens))
        policy = custom.get("blend_policy")
        if policy and self.lost:
            self.lost -= 1
            raise NoReportError("lost")
        logprobs = {t: math.log(0.1) for t in wanted.ids or range(wanted.top)}
        again = 0 if policy in (None, "none") else 3
        tokens = Tokens(10, 0, 9 - again, again, 1, 10, self.COSTS.get(policy, 1.0), None)
        text = " tin" if max_new_tokens <= 3 else " a tin to the end"
        return Reply(0.5, text, Output((4,), (logprobs,)), tokens)


def scripted(tokenizer, client, steps=1, most=3, **options):
    prompt = Prompt("H", ("one", "two"), "Q?")
    step = Step(prompt, (Reference("local", ("tin",)),), most)
    first = Step(prompt, step.expected, 3, measured=False)
    probe = Probe("c", warmup(prompt, "alone"), (first,) * (steps - 1) + (step,))
    runner = Runner(client, Encoder(tokenizer), plan(["query:0.1"]), RunOptions(**options))
    return runner.run(Suite("s", "accuracy", (probe,)))


def test_each_setting_has_a_state_of_its_own(tokenizer):
    client = ScriptedClient()
    samples = scripted(tokenizer, client, isolate="salt", top_logprobs=4)
    assert "flush" not in client.log
    # Once unmeasured, once measured: full prefill alone, the others behind two warm-ups.
    states = [list(group) for _, group in itertools.groupby(client.log, key=lambda e: e[2])]
    assert [len(s) for s in states] == [1, 3, 3, 3, 3] * 2
    assert len({s[0][2] for s in states}) == len(states)
    for state in states:
        assert all(custom == {"blend": False} for custom, *_ in state[:-1])
        assert all(not (wanted.top or wanted.ids) for _, wanted, *_ in state[:-1])
    measured = states[5:]
    assert measured[0][-1][1].top == 4
    assert all(s[-1][1].ids == (0, 1, 2, 3) for s in measured[1:])
    assert [s[-1][0] for s in measured] == [
        {"blend": False},
        {"blend": False},
        {"blend_policy": "none"},
        {"blend_policy": "query", "blend_ratio": 0.1},
        {"blend_policy": "random", "blend_ratio": pytest.approx(3 / 9)},
    ]
    assert [s.setting for s in samples] == [s.name for s in plan(["query:0.1"])]
    assert all(s.agreement.same and s.grades[0].accuracy == 1.0 for s in samples)


def test_an_interrupted_run_tells_what_it_has(tokenizer):
    class Interrupted(ScriptedClient):
        def ask(self, ids, **kw):
            if len(self.log) >= 30:
                raise KeyboardInterrupt
            return super().ask(ids, **kw)

    prompt = Prompt("H", ("one", "two"), "Q?")
    probe = Probe("c", (), (Step(prompt, (Reference("local", ("tin",)),), 3),))
    runner = Runner(Interrupted(), Encoder(tokenizer), plan(["query:0.1"]))
    samples = runner.run(Suite("s", "accuracy", (probe,) * 20))
    # One probe unmeasured, five asks each; the sixth measured one is not complete.
    assert [s.probe for s in samples] == [i for i in range(5) for _ in range(5)]
    early = Interrupted()
    early.log = ["full"] * 30
    with pytest.raises(KeyboardInterrupt):
        Runner(early, Encoder(tokenizer), plan([])).run(Suite("s", "accuracy", (probe,)))


def test_flushing_keeps_states_apart_as_well(tokenizer):
    client = ScriptedClient()
    scripted(tokenizer, client, isolate="flush")
    assert client.log.count("flush") == 10
    assert all(e[2] is None for e in client.log if e != "flush")


def test_a_lost_report_means_a_new_state(tokenizer):
    client = ScriptedClient(lost=3)
    samples = scripted(tokenizer, client)
    assert len(samples) == 5
    tries = [e for e in client.log if e[0].get("blend_policy") == "none"]
    assert len(tries) == 5 and len({e[2] for e in tries}) == 5
    with pytest.raises(NoReportError):
        scripted(tokenizer, ScriptedClient(lost=100))


def test_what_an_unmeasured_prompt_cost_is_not_forgotten(tokenizer):
    samples = scripted(tokenizer, ScriptedClient(), steps=3)
    spent = {s.setting: (s.step, s.spent, s.whole) for s in samples}
    assert spent["full prefill"] == (2, 30.0, 30)
    assert spent["query:0.1"] == (2, pytest.approx(12.0), 30)


def test_long_answers_are_asked_for_again_for_their_text(tokenizer):
    client = ScriptedClient()
    samples = scripted(tokenizer, client, most=9, logprob_positions=2)
    asked = [(w.top or len(w.ids), most) for c, w, _, most in client.log if c.get("blend_policy")]
    assert asked == [(20, 2), (0, 9)] * 6
    assert {s.text for s in samples} == {" a tin to the end"}
    assert len({e[2] for e in client.log}) == 20


def test_prompts_that_are_too_long_lose_documents_in_the_middle(tokenizer):
    encoder = Encoder(tokenizer)
    prompt = Prompt("H", tuple(c * 50 for c in "abcde"), "Q?")
    step = Step(prompt, (Reference("k", ("x",)),), 3, first_line=True)
    suite = Suite("s", "f1", (Probe("c", warmup(prompt, "alone"), (step,)),))

    def fit(limit):
        runner = Runner(Client("http://x"), encoder, plan([]), RunOptions(max_prompt_tokens=limit))
        return runner.fit(suite)

    assert fit(None) == fit(1000) == suite
    probe = fit(170).probes[0]
    assert [d[0] for d in probe.steps[0].prompt.documents] == ["a", "d", "e"]
    assert [w.documents[0][0] for w in probe.warmup] == ["a", "d", "e"]
    assert probe.steps[0].first_line and encoder.length(probe.steps[0].prompt) <= 170
    with pytest.raises(ConfigError, match="does not fit into 20 tokens"):
        fit(20)
