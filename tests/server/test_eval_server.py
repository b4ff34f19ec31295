"""``sgl-blend eval`` through a real server. Starts one SGLang server on a CPU (or a GPU).

The model has random weights: its answers mean nothing, but what must be exact is, what is
approximate differs, and costs are what they are for any weights.
"""

import argparse
import json

import pytest

from sgl_blend.cli import eval as cli
from sgl_blend.eval.client import Client
from sgl_blend.eval.encoding import Encoder
from sgl_blend.eval.evaluate import EvalOptions, evaluate
from sgl_blend.eval.runner import Runner, RunOptions
from sgl_blend.eval.settings import plan
from sgl_blend.eval.stats import Bootstrap
from sgl_blend.eval.summary import summarise
from sgl_blend.eval.synthetic import Shape, synthetic

SHAPE = Shape(n_docs=2, n_legends=1, doc_tokens=(30, 40), questions=2)
SETTINGS = plan(["all", "query:1.0", "query:0.2", "leading:0.3"])
#: nats: fp32 noise of another order of summation, and far below what reuse does
NOISE = 1e-5


@pytest.fixture(scope="module")
def url(model, start):
    args = ["--enable-blend", "--blend-continuation", "extend", "--max-total-tokens", "16384"]
    return start(model, [*args, "--blend-max-generation", "0"]).url


def measure(url, model, settings=SETTINGS, options=None, asking="one", **kw):
    suite = synthetic(asking, cases=1, seed=3, shape=SHAPE, **kw)
    runner = Runner(Client(url), Encoder(model), settings, options)
    samples = runner.run(suite)
    rows = summarise(samples, settings, suite.metric, Bootstrap(100))
    return samples, {r.setting: r for r in rows}


@pytest.fixture(scope="module")
def measured(url, model):
    return measure(url, model)


def test_exact_rows_agree_with_full_prefill(measured):
    samples, rows = measured
    for name in ("full prefill", "prefix cache only", "all", "query:1.0"):
        row = rows[name]
        assert row.top1.value == row.same.value == 1.0
        assert 0.0 <= row.kl.value < NOISE
        assert all(k.loss.value == 0.0 for k in row.kinds)
    assert {k.kind for k in rows["full prefill"].kinds} == {"local", "dependent"}


def test_the_measure_bites(measured):
    _, rows = measured
    assert rows["full reuse"].kl.value > 100 * NOISE
    assert rows["query:0.2"].kl.value > 100 * NOISE


def test_costs_are_those_of_the_rows_that_ran(measured):
    samples, rows = measured
    assert rows["full prefill"].cost.value == rows["full prefill"].speedup.value == 1.0
    for s in samples:
        t = s.tokens
        assert t.prompt == t.prefix + t.reused + t.recomputed + t.computed and s.ttft > 0
        if s.setting == "full prefill":
            assert t.prefix == 0
        elif s.setting in ("prefix cache only", "all"):
            # System prompt and first document were seen together, behind nothing else.
            assert 0 < t.prefix < t.prompt
            assert t.true_cost == pytest.approx((t.prompt - t.prefix) / t.prompt)
        elif s.setting == "full reuse":
            assert t.recomputed == 0
            assert t.true_cost == pytest.approx(t.computed / t.prompt, abs=1e-4)
        elif s.setting == "leading:0.3":
            run = t.computed + t.recomputed
            assert t.true_cost == pytest.approx(run / t.prompt, abs=1e-4)
    # The question's pass is paid for: 3 of 4 layers for its rows.
    assert rows["query:1.0"].cost.value > rows["all"].cost.value


def test_random_costs_what_its_twin_costs(measured):
    samples, rows = measured
    for name in ("query:0.2", "leading:0.3"):
        twin = rows[f"random = {name}"]
        # A token of some 500, and four decimals in the report.
        assert twin.cost.value == pytest.approx(rows[name].cost.value, abs=0.003)
    assert rows["random = leading:0.3"].ratio == pytest.approx(0.3, abs=0.01)


def test_flushed_and_salted_states_are_the_same_state(url, model, measured):
    settings = plan(["query:0.2"])
    flushed, _ = measure(url, model, settings, RunOptions(isolate="flush"))
    salted = {(s.setting, s.probe): s for s in measured[0]}
    for s in flushed:
        other = salted[s.setting, s.probe]
        assert (s.tokens, s.text) == (other.tokens, other.text)


@pytest.mark.parametrize("at_once", [1, 8])
def test_a_state_that_all_share_is_the_same_state(url, model, measured, at_once):
    # In another order, so that what one leaves is before another than in the first run.
    settings = (SETTINGS[0], *reversed(SETTINGS[1:]))
    together = 1 if at_once == 1 else 2  # the answers of both probes are decoded together
    options = RunOptions("probe", at_once=at_once, probes_at_once=together)
    shared, _ = measure(url, model, settings, options)
    salted = {(s.setting, s.probe): s for s in measured[0]}
    assert len(shared) == len(salted)
    for s in shared:
        other = salted[s.setting, s.probe]
        assert (s.text, s.agreement.agreed) == (other.text, other.agreement.agreed)
        assert s.agreement.kl == pytest.approx(other.agreement.kl, abs=NOISE)
        assert (s.tokens.reused, s.tokens.recomputed, s.tokens.prefix) == (
            other.tokens.reused,
            other.tokens.recomputed,
            other.tokens.prefix,
        )
        assert s.spent == pytest.approx(other.spent, abs=0.1)
        assert (s.ttft > 0.0) is (at_once == 1)


def test_policies_at_equal_cost_cost_the_same(url, model):
    settings = plan(["query:0.3", "hkvd:0.15", "leading~query:0.3", "query~hkvd:0.15"], twins=())
    _, rows = measure(url, model, settings, RunOptions("probe", at_once=8))
    for name, target in (("leading = query:0.3", "query:0.3"), ("query = hkvd:0.15", "hkvd:0.15")):
        assert rows[name].cost.value == pytest.approx(rows[target].cost.value, abs=0.01)
    assert rows["hkvd:0.15"].cost.value > rows["query:0.3"].cost.value + 0.05


def test_unseen_documents_are_computed(url, model):
    _, rows = measure(url, model, plan(["query:0.2"]), seen=("none",))
    for row in rows.values():
        assert row.cost.value == 1.0 and row.reused.value == 0.0
        assert 0.0 <= row.kl.value < NOISE


def test_documents_seen_in_other_orders_are_reused(url, model):
    _, rows = measure(url, model, plan([]), seen=("other",))
    assert rows["full reuse"].reused.value > 0.5
    assert rows["full reuse"].kl.value > 100 * NOISE


def test_another_question_than_the_selector_saw(url, model):
    samples, rows = measure(url, model, plan(["query:0.2"]), asking="other")
    assert [s.step for s in samples] == [1] * len(samples)
    for name in ("full reuse", "query:0.2", "random = query:0.2"):
        assert rows[name].continued.value == 1.0
    for name in ("full prefill", "prefix cache only"):
        assert rows[name].continued.value == 0.0 and 0.0 <= rows[name].kl.value < NOISE
    # The first question's prefill is in the cost; the second one's alone is a few tokens.
    one = next(s for s in samples if s.setting == "query:0.2")
    assert one.spent > 2 * one.tokens.true_cost * one.tokens.prompt


def test_settings_with_options_get_servers_of_their_own(model):
    settings = ("hkvd:0.1", "hkvd:0.1+check_layers=2")
    options = EvalOptions(
        model=str(model),
        settings=settings,
        twins=(),
        server_args=("--max-total-tokens", "16384"),
        asking={"one": 1, "turns": 1},
        shape=SHAPE,
        bootstrap=Bootstrap(50),
    )
    [done] = evaluate(options)
    rows = {r.setting: r for r in done.rows}
    assert {k.kind for k in done.rows[0].kinds} == {"local", "dependent", "turns"}
    costs = [rows[s].cost.value for s in settings]
    # Three of four layers instead of two for all rows but the prefix.
    assert costs[1] > costs[0]
    assert costs[1] > 0.75 * rows["prefix cache only"].cost.value


def test_turns_of_a_conversation(url, model):
    samples, rows = measure(url, model, plan(["all"]), asking="turns", per_prompt=2)
    assert sorted({s.step for s in samples}) == [0, 1]
    assert rows["all"].top1.value == 1.0 and 0.0 <= rows["all"].kl.value < NOISE
    second = [s for s in samples if s.step == 1 and s.setting == "prefix cache only"]
    assert all(s.tokens.true_cost < 0.5 for s in second)


def test_stated_boundaries_reach_the_server(url, model):
    suite = synthetic("one", cases=1, seed=3, shape=SHAPE)
    encoder = Encoder(model, boundaries="question")
    samples = Runner(Client(url), encoder, plan([])).run(suite)
    reuse = next(s for s in samples if s.setting == "full reuse")
    tail = len(encoder.encode(suite.probes[0].steps[0].prompt).ids)
    tail -= encoder.encode(suite.probes[0].steps[0].prompt).boundaries[0]
    assert reuse.tokens.computed >= tail > 0
    assert reuse.tokens.prefix + reuse.tokens.reused == reuse.tokens.prompt - reuse.tokens.computed


def test_a_data_file_becomes_a_table_a_file_and_a_picture(url, tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib", reason="the plot is an extra")
    monkeypatch.setenv("SGL_BLEND_CACHE_DIR", str(tmp_path / "cache"))
    passages = [
        f"Passage {i}:\nThe {w} mill\nIn the {w} mill {n} weavers work by the light of lamps, "
        f"and at noon the {w} bell is rung {n} times for all of them.\n"
        for i, (w, n) in enumerate((("old", 12), ("new", 7), ("far", 30)), 1)
    ]
    record = {
        "input": "How many weavers work in the new mill?",
        "context": "".join(passages),
        "answers": ["7", "seven"],
        "dataset": "2wikimqa",
    }
    data = tmp_path / "two.jsonl"
    data.write_text("".join(json.dumps(record | {"_id": i}) + "\n" for i in range(2)))
    parser = argparse.ArgumentParser()
    cli.add_parser(parser.add_subparsers())
    argv = ["eval", "--url", url, "--data", str(data), "--settings", "prefix,query:0.2"]
    argv += [
        "--limit",
        "1",
        "--max-new-tokens",
        "4",
        "--logprob-positions",
        "2",
        "--chat",
        "--seen",
        "alone,prompts",
        "--resamples",
        "50",
    ]
    argv += ["--json", str(tmp_path / "o.json"), "--plot", str(tmp_path / "o.png")]
    argv += ["--out", str(tmp_path / "out")]
    args = parser.parse_args(argv)
    assert args.run(args) == 0
    out = capsys.readouterr().out
    assert "two: 1 prompts of 1 cases; each document seen alone before" in out
    assert "in two other prompts" in out and "random = query:0.2" in out
    told = json.loads((tmp_path / "o.json").read_text())["evaluations"][0]
    first, other = told["tables"]
    rows = {r["setting"]: r for r in first["rows"]}
    assert rows["prefix cache only"]["same"]["value"] == 1.0
    assert told["metric"] == "f1" and rows["full prefill"]["cost"]["value"] == 1.0
    assert rows["query:0.2"]["reused"]["value"] > 0.3
    elsewhere = {r["setting"]: r for r in other["rows"]}
    assert list(elsewhere) == ["full prefill", "full reuse", "query:0.2"]
    assert elsewhere["query:0.2"]["reused"]["value"] > 0.3
    for picture in (tmp_path / "o.png", tmp_path / "out" / "two.png"):
        assert picture.read_bytes()[:4] == b"\x89PNG"
    records = (tmp_path / "out" / "records.jsonl").read_text()
    # Full prefill once, and each way with each of its other rows.
    assert len(records.splitlines()) == 1 + 4 + 2
    assert "weavers" not in records and "seven" not in records and "mill" not in records
