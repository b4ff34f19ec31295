"""The figures of ``sgl-blend eval``: metrics, divergences, intervals, costs, settings.

Needs a CPU and numpy; expected values are worked out by hand. No server.
"""

import math

import pytest

from sgl_blend.errors import ConfigError
from sgl_blend.eval.cost import Tokens, equal_ratio, read_tokens
from sgl_blend.eval.fidelity import Agreement, Output, agreement, truncated_kl
from sgl_blend.eval.metrics import (
    common_subsequence,
    exact_match,
    f1,
    grade,
    normalise,
    recall,
    rouge_l,
)
from sgl_blend.eval.probes import Prompt, Reference, Step
from sgl_blend.eval.settings import PREFIX, parse, plan
from sgl_blend.eval.stats import Bootstrap
from sgl_blend.harness.client import ServerError

# --- metrics ---------------------------------------------------------------------------------


def test_normalise_drops_case_punctuation_articles_and_space():
    assert normalise("  The Cat's, a  HAT! ") == "cats hat"
    assert normalise("theatre an") == "theatre"


def test_exact_match_takes_any_reference():
    assert exact_match("the Eiffel Tower.", ["Big Ben", "Eiffel tower"]) == 1.0
    assert exact_match("Eiffel", ["Big Ben", "Eiffel tower"]) == 0.0


def test_f1_by_hand():
    # said: cat sat on mat (4), wanted: cat lay on red mat (5), common: cat on mat (3)
    assert f1("the cat sat on the mat", ["a cat lay on the red mat"]) == pytest.approx(6 / 9)
    # a repeated word counts as often as both have it: common 1, said 2, wanted 1
    assert f1("yes yes", ["yes"]) == pytest.approx(2 / 3)
    assert f1("copper", ["tin", "red copper"]) == pytest.approx(2 / 3)
    assert f1("", ["tin"]) == f1("tin", [""]) == 0.0
    assert f1("the", ["a"]) == 1.0


def test_common_subsequence_by_hand():
    assert common_subsequence("abcbdab", "bdcaba") == 4
    assert common_subsequence("abc", "") == 0


def test_rouge_l_by_hand():
    # Lin (2004), section 3.1: police [the] gunman -> LCS 3 of 4 and 4; 2 of 4 and 4
    assert rouge_l("police kill the gunman", ["police killed the gunman"]) == pytest.approx(0.75)
    assert rouge_l("the gunman kill police", ["police killed the gunman"]) == pytest.approx(0.5)
    assert rouge_l("Anna, called?", ["anna called Ben", "x"]) == pytest.approx(4 / 5)
    assert rouge_l("", ["x"]) == 0.0


def test_recall_is_the_share_of_references_said():
    assert recall("They are 17 and 23.", ["17", "99", "23", "4"]) == 0.5
    assert recall("BLUE whale", ["blue"]) == 1.0


def test_a_grade_holds_every_metric():
    g = grade("dependent", " The copper. ", ("copper",))
    assert (g.accuracy, g.em, g.f1, g.rouge_l, g.recall) == (
        0.0,
        1.0,
        1.0,
        pytest.approx(2 / 3),
        1.0,
    )
    assert grade("local", " copper\n", ("copper",)).value("accuracy") == 1.0


def test_joint_answers_are_graded_word_by_word():
    wanted = tuple(
        Reference(k, (a,)) for k, a in (("local", "tin"), ("dependent", "fig"), ("local", "ox"))
    )
    step = Step(Prompt("", ("d",), "q"), wanted, 8, places=(4, 2, 0))
    assert [g.accuracy for g in step.grades(" ox, fig and tin ")] == [1.0, 1.0, 1.0]
    assert [g.accuracy for g in step.grades("ox and elm and tin")] == [1.0, 0.0, 1.0]
    assert [g.accuracy for g in step.grades("ox")] == [0.0, 0.0, 1.0]
    assert [g.kind for g in step.grades("")] == ["local", "dependent", "local"]


def test_only_the_first_line_counts_where_asked():
    step = Step(Prompt("", ("d",), "q"), (Reference("k", ("yes",)),), 8, first_line=True)
    assert step.grades("\nyes\nDialogue: no")[0].accuracy == 1.0


# --- fidelity --------------------------------------------------------------------------------


def logs(**p):
    return {ord(k): math.log(v) for k, v in p.items()}


def test_truncated_kl_by_hand():
    p, q = logs(a=0.5, b=0.3), logs(a=0.25, b=0.25)
    want = 0.5 * math.log(2) + 0.3 * math.log(0.3 / 0.25) + 0.2 * math.log(0.2 / 0.5)
    assert truncated_kl(p, q) == pytest.approx(want)
    assert truncated_kl(p, p) == 0.0


def test_truncated_kl_is_a_lower_bound_that_the_whole_vocabulary_reaches():
    p, q = logs(a=0.5, b=0.3, c=0.15, d=0.05), logs(a=0.2, b=0.3, c=0.1, d=0.4)
    whole = sum(math.exp(p[t]) * (p[t] - q[t]) for t in p)
    assert truncated_kl(p, q) == pytest.approx(whole)
    tops = [truncated_kl({t: p[t] for t in list(p)[:k]}, q) for k in (1, 2, 3)]
    assert tops == sorted(tops) and tops[-1] <= whole + 1e-12


def test_truncated_kl_wants_every_token():
    with pytest.raises(ConfigError, match="token 98"):
        truncated_kl(logs(a=0.5, b=0.3), logs(a=0.5))


def test_agreement_ends_with_the_first_difference():
    row, other = logs(a=0.9), logs(a=0.6)
    exact = Output((97, 97, 98, 99), (row,) * 4)
    got = agreement(exact, Output((97, 97, 97, 99), (row, other, other, row)))
    assert (got.compared, got.agreed, got.same) == (3, 2, False)
    assert got.kl[0] == 0.0 and got.kl[1] == got.kl[2] > 0.0
    # One token alone is known of each position: nothing comes near it.
    assert agreement(exact, exact) == Agreement(4, 4, (0.0,) * 4, True, (math.inf,) * 4)
    assert got.first == got.kl[0]
    more, less = logs(a=0.5, b=0.25), logs(a=0.5, b=0.125)
    got = agreement(Output((97,), (row,), more), Output((97,), (row,), less))
    assert got.kl == (0.0,) and got.first == pytest.approx(truncated_kl(more, less))
    sure, near, tie = logs(a=0.9, b=0.05), logs(a=0.4, b=0.38), logs(a=0.3, b=0.3)
    got = agreement(Output((97,) * 3, (sure, near, tie)), Output((97, 97, 98), (sure, near, tie)))
    assert got.margins == pytest.approx((math.log(18), math.log(40 / 38), 0.0))
    assert got.clear(0.0) == (2, 3) and got.clear(0.05) == (2, 2) and got.clear(0.1) == (1, 1)
    assert got.clear(3.0) == (0, 0)
    short = agreement(exact, Output((97, 97), (row, row)))
    assert (short.compared, short.agreed, short.same) == (2, 2, False)


# --- intervals -------------------------------------------------------------------------------


def test_bootstrap_of_two_clusters_is_known():
    # Draws of two out of {0, 1}: means 0, 1/2, 1/2, 1 with equal chance.
    e = Bootstrap(resamples=20_000, confidence=0.4).mean({"a": [0.0], "b": [1.0]})
    assert (e.value, e.low, e.high) == (0.5, 0.5, 0.5)
    e = Bootstrap(resamples=20_000, confidence=0.6).mean({"a": [0.0], "b": [1.0]})
    assert (e.low, e.high) == (0.0, 1.0)


def test_bootstrap_agrees_with_the_normal_interval():
    values = {str(i): [float(i % 5)] for i in range(500)}
    e = Bootstrap(resamples=4000).mean(values)
    half = 1.96 * math.sqrt(2.0 / 500)  # 0..4, evenly: variance 2
    assert e.value == 2.0
    assert e.low == pytest.approx(2.0 - half, abs=0.02) and e.high == pytest.approx(
        2.0 + half, abs=0.02
    )


def test_bootstrap_draws_clusters_not_samples():
    e = Bootstrap().mean({"a": [0.0] * 50, "b": [1.0] * 50})
    assert (e.low, e.high, e.n, e.clusters) == (0.0, 1.0, 100, 2)


def test_bootstrap_of_ratios_and_of_nothing():
    e = Bootstrap().ratio({"a": [(1.0, 2.0), (3.0, 2.0)], "b": [(2.0, 4.0)], "c": []})
    assert (e.value, e.n, e.clusters) == (0.75, 3, 2)
    assert (e.low, e.high) == (0.5, 1.0)
    assert Bootstrap().mean({}) is None
    assert Bootstrap().ratio({"a": [(1.0, 0.0)]}) is None


def test_bootstrap_refuses_what_makes_no_sense():
    for kw in ({"resamples": 0}, {"confidence": 1.0}):
        with pytest.raises(ConfigError, match=next(iter(kw))):
            Bootstrap(**kw)


# --- cost ------------------------------------------------------------------------------------


def told(prompt=100, **report):
    base = {"prefix": 20, "reused": 60, "recomputed": 10, "computed": 10, "exact": 20}
    base |= {"cost": 0.25, "fallback": None, "policy": "query", "ratio": 0.15, "sources": {}}
    return read_tokens(prompt, base | report)


def test_true_cost_counts_the_prefix_as_saved():
    tokens = told()
    assert tokens.true_cost == pytest.approx(0.25 * 0.8)
    assert not tokens.continued and told(exact=5).continued


def test_cost_refuses_reports_that_do_not_add_up():
    with pytest.raises(ServerError, match="counts 101 tokens, the prompt has 100"):
        told(reused=61)
    with pytest.raises(ServerError, match="--enable-blend"):
        read_tokens(100, None)
    with pytest.raises(ServerError, match="malformed"):
        told(cost=None)


def test_random_spends_what_its_twin_spent():
    # 100 tokens, 20 prefix, 10 computed; 0.5 * 80 = 40 tokens' worth: 30 of 70 are random's
    assert equal_ratio([told(cost=0.5)]) == pytest.approx(30 / 70)
    twice = [told(cost=0.5), told(cost=0.125)]
    assert equal_ratio(twice) == pytest.approx(30 / 140)
    assert equal_ratio([Tokens(50, 20, 0, 0, 30, 50, 1.0, "x")]) == 0.0
    assert equal_ratio([told(cost=0.01)]) == 0.0


def test_a_policy_that_pays_for_its_choice_gets_less_to_recompute():
    # Check layers cost 0.1 of 80 tokens: 8 of the 40 tokens' worth, so 22 of 70 are left.
    like = told(recomputed=5, reused=65, cost=(10 + 5 + 8) / 80)
    assert equal_ratio([told(cost=0.5)], [like]) == pytest.approx((30 - 8) / 70)
    # What costs more than there is to spend gets nothing.
    assert equal_ratio([told(cost=0.2)], [like]) == 0.0


def test_tokens_behind_the_prefix_that_all_found():
    tokens = told()
    assert tokens.behind(20) == tokens.behind(30) == tokens
    # 3 exact tokens more than the first who asked found are what it had left there.
    seen = tokens.behind(17)
    assert (seen.prefix, seen.computed, seen.reused) == (17, 13, 60)
    assert seen.true_cost * 100 == pytest.approx(tokens.true_cost * 100 + 3)


# --- settings --------------------------------------------------------------------------------


def test_baselines_are_always_there():
    names = [s.name for s in plan(["query:0.1", "all", "none", "random:0.3", "default"])]
    assert names == [
        "full prefill",
        "prefix cache only",
        "full reuse",
        "query:0.1",
        "random = query:0.1",
        "all",
        "random:0.3",
        "default",
        "random = default",
    ]


def test_what_a_setting_asks_the_server_for():
    assert parse("query:0.1").custom() == {"blend_policy": "query", "blend_ratio": 0.1}
    assert parse("hkvd").custom() == {"blend_policy": "hkvd"}
    assert parse("default").custom() == {}
    assert PREFIX.custom() == {"blend": False}
    assert plan(["query:0.1"])[-1].custom(0.2) == {"blend_policy": "random", "blend_ratio": 0.2}


@pytest.mark.parametrize("text", ["", ":0.1", "query:x", "query:1.5", "default:0.1"])
def test_malformed_settings(text):
    with pytest.raises(ConfigError, match="setting"):
        plan([text])


def test_a_misspelt_policy_is_refused_before_a_server_starts():
    with pytest.raises(ConfigError, match="did you mean 'query'"):
        plan(["qurey:0.1"])


def test_a_setting_is_given_once():
    with pytest.raises(ConfigError, match="twice"):
        plan(["query:0.1", "query:0.1"])
