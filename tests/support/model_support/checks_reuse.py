"""What a blended request computed is found by the next one: new documents, and an agent's turns."""

from __future__ import annotations

from typing import Any
from unittest import mock

from model_support.engine import Ask, Outcome
from model_support.world import World, check, must_fail
from sgl_blend.plan import BLENDED, EXACT, ReuseSpan

#: the test tokenizer's ``<|sep|>``: documents and messages end with it
SEP = 3


def _spans(ours: Outcome) -> list[Any]:
    return [s for p in ours.pieces if p is not None and p.blend for s in p.blend.plan.spans]


@check
def new_text_is_found_again(world: World) -> dict[str, Any]:
    """[header][seen][new][question] with new and question well below ``max_suffix_tokens``: the
    new part is found from the second time on, with and without stated boundaries, alone and in
    pieces, as a source one generation behind what it was computed over. Its question begins where
    the boundaries say."""
    engine, desk = world.engine, world.desk
    for stated in (False, True):
        for chunks in ((), (100,)):
            engine.flush()
            seen, new = desk.fresh(150), desk.fresh(60)
            engine.run(Ask(desk.fresh(20) + seen + desk.fresh(30), blend=False))
            for turn in range(3):
                cuts = [20, 170, 230] if stated else None
                tokens = desk.fresh(20) + seen + new + desk.fresh(30)
                [ours] = engine.run(Ask(tokens, boundaries=cuts, chunks=chunks))
                reused = {i for s in _spans(ours) for i in range(s.start, s.end)}
                # The last row of a piece is always computed.
                there = set(range(20, 230 if turn else 170)) - {end - 1 for end in ours.ends}
                assert there <= reused, sorted(there - reused)
                plan = next(p for p in ours.pieces if p is not None and p.blend).blend.plan
                assert plan.suffix_start == len(tokens) - (30 if stated else 16)
                assert (ours.labels[:20] == EXACT).all()
                assert (ours.labels[sorted(reused)] == BLENDED).all()
                assert (ours.labels[max(reused) + 1 :] == (2 if turn else 1)).all()
            engine.check()
    return {}


@check
def an_agent_computes_its_new_tokens_only(world: World) -> dict[str, Any]:
    """Twelve turns of a conversation over documents computed elsewhere: each computes what is new
    in it, and its label stays 1, since all before it stays in place."""
    figures = {"computed a turn": _turns(world)}
    stays = mock.patch.object(ReuseSpan, "next_generation", property(lambda s: s.generation + 1))
    with stays:
        must_fail("KV in place counts as moved", lambda: _turns(world))
    return figures


def _turns(world: World) -> int:
    engine, desk = world.engine, world.desk
    engine.flush()
    docs = [desk.fresh(200) for _ in range(3)]
    for doc in docs:
        engine.run(Ask([*desk.fresh(9), SEP, *doc, SEP, *desk.fresh(30)], blend=False))
    tokens = [*desk.fresh(40), SEP]
    for doc in (docs[2], docs[0], docs[1]):
        tokens += [*doc, SEP]
    tokens += [*desk.fresh(40), SEP]
    known, most = 0, 0
    for turn in range(12):
        [ours] = engine.run(Ask(tokens, new_tokens=10))
        assert max(s.generation for s in _spans(ours)) == (1 if turn else 0)
        assert ours.labels.max() == 1
        if turn:
            # The last output token has no KV yet.
            spare = ours.report["computed"] - (len(tokens) - known)
            assert spare <= 1, f"turn {turn} computed {spare} known tokens"
            most = max(most, ours.report["computed"])
        known = len(tokens) + len(ours.tokens)
        tokens = [*tokens, *ours.tokens, SEP, *desk.fresh(60), SEP]
    engine.check()
    return most
