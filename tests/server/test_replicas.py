"""Two replicas of one server (``--dp-size 2``): a tree each, one store. Needs: CPU."""

from __future__ import annotations

import pytest
from polling import still
from scraping import Gained, by, check_sums
from store_servers import PATIENCE
from talk import Docs, all_at_once, ask, check_report, check_same

EXACT = {"blend": False}
ALL = {"blend_policy": "all"}


@pytest.fixture(scope="module")
def two(model, start):
    return start(model, ["--enable-blend", "--dp-size", "2", "--enable-metrics", *PATIENCE])


def test_each_replica_has_its_tree_and_both_have_one_store(two):
    docs = Docs(73, count=4, size=(150, 300))
    docs.warm(two, routed_dp_rank=0)
    here = ask(two, docs.prompt([2, 0, 1]), routed_dp_rank=0)
    check_report(here)
    assert set(here.blend["sources"]) == {"device"}, here.blend

    # What is offered is written in the background.
    assert still(lambda: by(two, "sgl_blend:store_chunks_total", "outcome")["stored",], but=0)
    there = ask(two, docs.prompt([2, 0, 1]), routed_dp_rank=1)
    check_report(there)
    assert set(there.blend["sources"]) == {"memory"}, there.blend


def test_the_metrics_of_both_add_up(two):
    docs, gained = Docs(75), Gained(two)
    docs.warm(two, routed_dp_rank=0)
    docs.warm(two, routed_dp_rank=1)
    gained.settled(2 * len(docs.docs))
    gained = Gained(two)
    orders = [[i % 6, (i + 2) % 6, (i + 3) % 6] for i in range(6)]
    jobs = [
        lambda i=i, o=o: ask(two, docs.prompt(o), routed_dp_rank=i % 2)
        for i, o in enumerate(orders)
    ]
    answers = all_at_once(jobs)
    assert sum(a.blend["reused"] for a in answers) > 1000
    check_sums(gained, answers)
    ranks = gained("sgl_blend:prompts_total", "dp_rank")
    assert ranks == {("0",): 3, ("1",): 3}


def test_both_replicas_answer_as_full_prefill(two):
    docs = Docs(74)
    for rank in (0, 1):
        docs.warm(two, routed_dp_rank=rank)
    prompts = [docs.prompt([i % 5, (i + 2) % 6]) for i in range(6)]
    jobs = [
        lambda p=p, i=i: ask(two, p, custom=ALL, routed_dp_rank=i % 2)
        for i, p in enumerate(prompts)
    ]
    for i, (prompt, answer) in enumerate(zip(prompts, all_at_once(jobs), strict=True)):
        check_report(answer)
        assert answer.blend["recomputed"] > 0
        check_same(answer, ask(two, prompt, custom=EXACT, routed_dp_rank=1 - i % 2))
    # SGLang spreads those that name none.
    for answer in all_at_once([lambda p=p: ask(two, p) for p in prompts]):
        check_report(answer)
    assert two.alive()
