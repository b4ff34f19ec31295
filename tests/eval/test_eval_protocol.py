"""The order in which ``sgl-blend eval`` asks, before a client that answers from a script. Needs:
CPU. The protocol through a real server is tested in ``tests/server/test_eval_server.py``."""

import itertools
import math
import threading
from dataclasses import replace

import pytest

from sgl_blend.errors import ConfigError
from sgl_blend.eval.client import Client, Reply, Wanted
from sgl_blend.eval.cost import NoReportError, Tokens
from sgl_blend.eval.encoding import Encoder
from sgl_blend.eval.evaluate import EvalOptions
from sgl_blend.eval.fidelity import Output
from sgl_blend.eval.probes import Probe, Prompt, Reference, Step, Suite, ways
from sgl_blend.eval.runner import Runner, RunOptions
from sgl_blend.eval.settings import plan


class ScriptedClient(Client):
    """A stand-in for a server: notes what it is asked, and answers one token after a cost that
    depends on the policy. The first ``lost`` answers to blended requests lose their report."""

    COSTS = {"none": 0.1, "query": 0.4, "random": 0.4}  # and at ratio 1 all of it

    def __init__(self, lost=0):
        super().__init__("http://127.0.0.1:9")
        self.log = []
        self.lost = lost

    def flush(self):
        self.log.append("flush")

    def generate(self, body):
        raise AssertionError("a stand-in sends nothing")

    def warm(self, prompts, custom, salt=None):
        for _, one in zip(prompts, custom, strict=True):
            self.log.append((one, Wanted(), salt, 1))

    def ask(self, ids, *, custom, max_new_tokens, wanted=None, salt=None, timed=True):
        self.log.append((custom, wanted, salt, max_new_tokens))
        policy = custom.get("blend_policy")
        if policy and self.lost:
            self.lost -= 1
            raise NoReportError("lost")
        logprobs = {t: math.log(0.1) for t in wanted.ids or range(wanted.top)}
        again = 0 if policy in (None, "none") else 3
        cost = 1.0 if custom.get("blend_ratio") == 1.0 else self.COSTS.get(policy, 1.0)
        tokens = Tokens(10, 0, 9 - again, again, 1, 10, cost, None)
        text = " tin" if max_new_tokens <= 3 else " a tin to the end"
        return Reply(0.5, text, Output((4,), (logprobs,)), tokens)


def scripted(tokenizer, client, steps=1, most=3, **options):
    prompt = Prompt("H", ("one", "two"), "Q?")
    step = Step(prompt, (Reference("local", ("tin",)),), most)
    first = Step(prompt, step.expected, 3, measured=False)
    probe = Probe("c", ways(prompt, ("alone",)), (first,) * (steps - 1) + (step,))
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
        {"blend_policy": "none"},
        {"blend_policy": "query", "blend_ratio": 0.1},
        {"blend_policy": "random", "blend_ratio": pytest.approx(3 / 9)},
        {"blend": False},
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
    probe = Probe("c", ways(prompt, ("none",)), (Step(prompt, (Reference("local", ("tin",)),), 3),))
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


class Remembering(ScriptedClient):
    """A stand-in that, like a server, hands each state's leftovers on: ``more`` exact tokens of
    the prefix after the first blended request, and whatever ``spoilt`` settings left there."""

    def __init__(self, spoilt=(), more=0):
        super().__init__()
        self.spoilt, self.more = spoilt, more
        self.warmed = []

    def warm(self, prompts, custom, salt=None):
        super().warm(prompts, custom, salt)
        self.warmed.append((salt, len(prompts)))

    def ask(self, ids, *, custom, salt=None, **kw):
        before = [e for e in self.log if e[2] == salt and e[0].get("blend_policy")]
        reply = super().ask(ids, custom=custom, salt=salt, **kw)
        if not custom.get("blend_policy") or not before:
            return reply
        tokens = reply.tokens
        if any(e[0]["blend_policy"] in self.spoilt for e in before):
            tokens = replace(tokens, reused=tokens.reused + 1, computed=0)
        elif self.more:
            cost = tokens.cost * 10 - self.more
            tokens = replace(tokens, prefix=self.more, computed=0, cost=cost / (10 - self.more))
        return replace(reply, tokens=tokens)


def shared(
    tokenizer,
    client,
    settings,
    at_once=1,
    seen=("alone",),
    elsewhere=None,
    probes=1,
    memory=None,
    others=None,
    **options,
):
    prompt = Prompt("H", ("one", "two", "three"), "Q?")
    step = Step(prompt, (Reference("local", ("tin",)),), 3)
    probe = Probe("c", ways(prompt, seen), (step,))
    rows = plan(settings, (), prefix=False)
    kept = None if elsewhere is None else [s for s in rows if s.name in elsewhere]
    how = RunOptions("probe", at_once=at_once, top_logprobs=4, **options)
    encoder, more = Encoder(tokenizer), {"elsewhere": kept, "memory": memory, "others": others}
    runner = Runner(client, encoder, rows, how, **more)
    suite = Suite("s", "accuracy", (probe,) * probes)
    before = runner.knows(suite)
    samples = runner.run(suite)
    assert before is (not samples)
    return samples


SETTINGS = ["random~query:0.1", "prefix", "query:0.1", "query:0.2"]


@pytest.mark.parametrize("at_once", [1, 8])
def test_documents_are_warmed_once_for_all_settings(tokenizer, at_once):
    client = Remembering()
    samples = shared(tokenizer, client, SETTINGS, at_once)
    # The warm-up's first prompt by itself; where nothing is timed, nothing runs unmeasured. Full
    # prefill has a state of its own, in which nothing else is ever asked.
    times = 2 if at_once == 1 else 1
    assert [n for _, n in client.warmed] == [1, 2] * times
    salts = {salt for salt, _ in client.warmed}
    assert len(salts) == times
    alone = [e for e in client.log if e[2] not in salts]
    assert [e[0] for e in alone] == [{"blend": False}] * times
    assert len({e[2] for e in alone}) == times
    state = [e[0] for e in client.log if e[2] == client.warmed[-1][0]][3:]
    # What depends on another's cost after it, and what leaves an exact copy last.
    assert len(state) == 5 and state[-1] == {"blend": False}
    assert state[-2] == {"blend_policy": "random", "blend_ratio": pytest.approx(3 / 9)}
    assert state[0] == {"blend_policy": "none"}
    names = ["full prefill", "prefix cache only", "full reuse", "random = query:0.1"]
    assert [s.setting for s in samples] == [*names, "query:0.1", "query:0.2"]


def test_what_may_be_computed_exactly_has_a_state_of_its_own(tokenizer):
    """Over a bound of risk a prompt is: the other rows must not find it."""
    client = Remembering()
    rows = ["query:0.1", "query:0.1;max_risk=0.1", "query:0.1+max_risk=0.1", "query:0.1;max_risk=0"]
    others = {(("max_risk", "0.1"),): client}
    samples = shared(tokenizer, client, rows, 8, others=others)
    assert {s.setting for s in samples} == {"full prefill", "full reuse", *rows}
    salts = [e[2] for e in client.log if e[0].get("blend_max_risk") == 0.1]
    common = [e[2] for e in client.log if e[0].get("blend_policy") == "none"]
    assert len(salts) == len(common) == 1 and salts != common
    # The server with a bound of its own has warmed one state for nobody, and one for its row.
    assert len({salt for salt, _ in client.warmed}) == 4


def test_a_bound_for_all_rows_is_refused():
    bound = {"model": "some", "server_args": ("--blend-max-risk", "0.1")}
    with pytest.raises(ConfigError, match="max_risk: what it computes exactly would be found"):
        EvalOptions(**bound, run=RunOptions(isolate="probe", at_once=8))
    EvalOptions(**bound, run=RunOptions(isolate="salt"))


def test_several_probes_are_under_way_at_a_time(tokenizer):
    """Each in a state of its own, and told in order; a third waits for one of the first two."""
    met = threading.Barrier(2, timeout=60)

    class Meeting(Remembering):
        def warm(self, prompts, custom, salt=None):
            if len(prompts) == 1 and len(self.warmed) < 4:
                met.wait()
            super().warm(prompts, custom, salt)

    client = Meeting()
    samples = shared(tokenizer, client, ["query:0.1"], 8, probes=4, probes_at_once=2)
    assert [s.probe for s in samples] == sorted(s.probe for s in samples)
    assert {s.probe for s in samples} == {0, 1, 2, 3} and len(samples) == 12
    assert len({salt for salt, _ in client.warmed}) == 4


class Known:
    """A memory that knows full prefill and some settings of probes, and notes what is added."""

    def __init__(self, *known, reply=None):
        self.known, self.reply, self.added = known, reply, []

    def exact(self, probe):
        return self.reply and [self.reply]

    def tokens(self, probe, seen, setting):
        return [Tokens(10, 0, 6, 3, 1, 10, 0.4, None)] if setting.name in self.known else None

    def add(self, probe, measured, exact):
        self.added.append(([s.setting for s in measured], [r.text for r in exact]))


def test_what_is_known_is_not_asked_for_again(tokenizer):
    rows = ["query:0.1", "random~query:0.1"]
    first = Known()
    shared(tokenizer, Remembering(), rows, 8, memory=first)
    names = ["full prefill", "full reuse", "query:0.1", "random = query:0.1"]
    assert first.added == [(names, [" tin"])]
    exact = Reply(0.0, " tin", Output((4,), ({3: math.log(0.1)},)), Tokens(*[10] * 6, 1.0, None))
    client, more = Remembering(), Known(*names[:3], reply=exact)
    samples = shared(tokenizer, client, rows, 8, memory=more)
    assert [s.setting for s in samples] == names[3:] and more.added == [(names[3:], [" tin"])]
    # Its ratio comes of what its twin is known to have cost, its tokens of full prefill's.
    [asked] = [e for e in client.log if e[0] != {"blend": False}]
    assert asked[0] == {"blend_policy": "random", "blend_ratio": pytest.approx(3 / 9)}
    assert asked[1].ids == (3,)
    client, all_of_it = Remembering(), Known(*names, reply=exact)
    assert shared(tokenizer, client, rows, 8, memory=all_of_it) == ()
    assert client.log == [] and all_of_it.added == []


def test_an_answer_that_found_anothers_leftovers_is_asked_for_anew(tokenizer):
    client = Remembering(spoilt=("query",))
    samples = shared(tokenizer, client, ["query:0.1", "query:0.2"])
    state = client.warmed[4][0]
    thrown = [e[0]["blend_ratio"] for e in client.log if e[2] == state and len(e[0]) == 2]
    assert thrown == [0.1, 0.2]
    found = {s.setting: s.tokens.reused + s.tokens.recomputed for s in samples[1:]}
    assert set(found.values()) == {9}
    again = [e for e in client.log if e[0].get("blend_ratio") == 0.2 and e[2] != state]
    # Unmeasured: thrown away and asked anew; measured: asked anew.
    assert len({e[2] for e in again}) == 3


def test_a_few_exact_tokens_that_others_left_are_no_saving(tokenizer):
    plain = shared(tokenizer, Remembering(), ["query:0.1", "query:0.2"])
    grown = shared(tokenizer, Remembering(more=1), ["query:0.1", "query:0.2"])
    for a, b in zip(plain, grown, strict=True):
        assert a.tokens.prefix == b.tokens.prefix == 0
        assert b.spent == pytest.approx(a.spent)


def test_what_makes_all_of_it_exact_has_a_state_of_its_own(tokenizer):
    client = Remembering()
    shared(tokenizer, client, ["all", "query:1.0", "query:0.1", "random~query:1.0"])
    asked = [(e[0]["blend_policy"], e[2]) for e in client.log if e[0].get("blend_policy")]
    alone = [salt for policy, salt in asked if [s for _, s in asked].count(salt) == 1]
    # The ratio of the last one is not known before it is asked.
    assert [p for p, salt in asked if salt in alone] == ["all", "query", "random"] * 2


def test_ways_share_the_exact_answer_and_meet_the_settings_named(tokenizer):
    client = Remembering()
    seen = ("alone", "other", "system")
    samples = shared(tokenizer, client, ["query:0.1", "query:0.2"], 1, seen, ["query:0.2"])
    assert [(s.seen, s.setting) for s in samples] == [
        ("", "full prefill"),
        ("alone", "full reuse"),
        ("alone", "query:0.1"),
        ("alone", "query:0.2"),
        ("other", "query:0.2"),
        ("system", "query:0.2"),
    ]
    exact = [e for e in client.log if e[1].top]
    assert len(exact) == 2  # once unmeasured


def test_more_of_the_first_position_is_asked_for_in_the_same_state(tokenizer):
    client = ScriptedClient()
    samples = scripted(tokenizer, client, top_logprobs=4, first_logprobs=6)
    asked = [e for e in client.log if e[1].top or e[1].ids]
    for i in range(0, len(asked), 2):
        (custom, want, salt, most), (again, first, also, one) = asked[i : i + 2]
        assert (again, also, most, one) == (custom, salt, 3, 1)
        assert max(want.top, len(want.ids)) == 4 and max(first.top, len(first.ids)) == 6
    assert len(asked) == 20 and all(s.agreement.first == 0.0 for s in samples)


def test_no_more_tokens_are_asked_for_than_there_are(tokenizer):
    client = ScriptedClient()
    scripted(tokenizer, client, top_logprobs=10**6, first_logprobs=10**6)
    most = Encoder(tokenizer).vocabulary
    assert 256 < most < 300
    assert {e[1].top for e in client.log if e[1].top} == {most}


def test_what_is_asked_at_once_is_asked_in_one_piece():
    sent = []

    class Recorded(Client):
        def generate(self, body):
            sent.append(body)
            report = dict.fromkeys(("prefix", "recomputed", "exact"), 0)
            report |= {"reused": 1, "computed": 1, "cost": 0.5, "fallback": None}
            meta = {"prompt_tokens": 2, "blend": report, "finish_reason": {"type": "length"}}
            return {"text": "x", "output_ids": [5], "meta_info": meta}

    reply = Recorded("http://127.0.0.1:9").ask([1, 2], custom={}, max_new_tokens=1, timed=False)
    assert (reply.text, reply.ttft, reply.tokens.reused) == ("x", 0.0, 1)
    assert "stream" not in sent[0]


def test_only_states_of_a_probe_are_shared():
    with pytest.raises(ConfigError, match="at_once is 2"):
        RunOptions("salt", at_once=2)
    with pytest.raises(ConfigError, match="probes_at_once is 2: with at_once 1 answers are timed"):
        RunOptions("probe", probes_at_once=2)


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
    # In the same state: behind its own KV.
    assert len({e[2] for e in client.log}) == 10


def test_prompts_that_are_too_long_lose_documents_in_the_middle(tokenizer):
    encoder = Encoder(tokenizer)
    prompt = Prompt("H", tuple(c * 50 for c in "abcde"), "Q?")
    step = Step(prompt, (Reference("k", ("x",)),), 3, first_line=True)
    suite = Suite("s", "f1", (Probe("c", ways(prompt, ("alone",)), (step,)),))

    def fit(limit):
        runner = Runner(Client("http://x"), encoder, plan([]), RunOptions(max_prompt_tokens=limit))
        return runner.fit(suite)

    assert fit(None) == fit(1000) == suite
    probe = fit(170).probes[0]
    assert [d[0] for d in probe.steps[0].prompt.documents] == ["a", "d", "e"]
    assert [w.documents[0][0] for w in probe.ways[0].prompts] == ["a", "d", "e"]
    assert probe.steps[0].first_line and encoder.length(probe.steps[0].prompt) <= 170
    with pytest.raises(ConfigError, match="does not fit into 20 tokens"):
        fit(20)
