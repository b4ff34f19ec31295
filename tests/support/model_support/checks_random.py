"""Random traffic from a pool of documents, and what must hold at every step of it."""

from __future__ import annotations

from collections import Counter
from typing import Any
from unittest import mock

import numpy as np
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from sglang.srt.mem_cache.base_prefix_cache import EvictParams

from model_support.asks import Ask, Outcome
from model_support.checks_blend import POLICIES
from model_support.compare import KV_FP32, apart, require_equal, require_layer0
from model_support.world import World, check, must_fail
from sgl_blend.chunking import as_tokens, chunk_digest
from sgl_blend.engine.request.planner import Planner
from sgl_blend.plan import BLENDED, EXACT
from sgl_blend.tree.integrity import tree_nodes

EXAMPLES = 14
QUESTIONS = (9, 37, 60)
HEADS = (0, 23, 40)

_parts = st.lists(st.integers(0, 5), min_size=1, max_size=4)
_request = st.fixed_dictionaries(
    {
        "head": st.integers(0, len(HEADS) - 1),
        "order": _parts,
        "question": st.integers(0, len(QUESTIONS) - 1),
        "policy": st.sampled_from(("all", "plain", *POLICIES, *POLICIES)),
        "ratio": st.sampled_from((0.0, 0.1, 0.33, 1.0)),
        "coverage": st.sampled_from((None, None, 0.3, 0.95)),
        "stated": st.sampled_from(("no", "no", "all", "some")),
        "chunks": st.lists(st.integers(1, 150), max_size=4),
        "new_tokens": st.integers(1, 3),
    }
)
_traffic = st.lists(st.lists(_request, min_size=1, max_size=3), min_size=2, max_size=6)


def _ask(world: World, r: dict[str, Any]) -> Ask:
    parts = [world.heads[r["head"]], *(world.desk.docs[i] for i in r["order"])]
    parts = [p for p in [*parts, world.questions[r["question"]]] if p]
    cuts = np.cumsum([len(p) for p in parts[:-1]]).tolist()
    stated = {"no": None, "all": cuts, "some": cuts[::2]}[r["stated"]]
    plain = r["policy"] == "plain"
    return Ask(
        [t for p in parts for t in p],
        policy=None if plain else r["policy"],
        ratio=None if plain else r["ratio"],
        blend=not plain,
        boundaries=stated,
        chunks=r["chunks"],
        coverage=r.get("coverage") if r["policy"] in ("query", "hkvd") else None,
        new_tokens=r["new_tokens"],
    )


def _path(node: Any) -> list[Any]:
    path = []
    while node.parent is not None:
        path.append(node)
        node = node.parent
    return path[::-1]


def _check_index(world: World) -> None:
    """Each index entry is a chunk of its path whose tokens may all serve as a source."""
    tree = world.engine.tree
    index, chunking = tree.index, tree.config.chunking
    for node in tree_nodes(tree):
        path = _path(node)
        tokens = np.concatenate([as_tokens(n.key.token_ids)[: len(n.key)] for n in path])
        labels = np.concatenate(
            [np.zeros(len(n.key)) if n.blend.labels is None else n.blend.labels for n in path]
        )
        for entry in node.blend.entries:
            end, digest = index.end(entry), index._digests[entry]
            begin = [
                end - n
                for n in range(chunking.min_len, chunking.max_len + 1)
                if n <= end and chunk_digest(node.blend.tenant, tokens[end - n : end]) == digest
            ]
            assert len(begin) == 1, f"an entry at {end} is the digest of no chunk that ends there"
            part = labels[begin[0] : end]
            assert (part >= EXACT).all(), f"a blended token in an index entry: {part}"
            assert part.max() <= tree.config.max_generation


def _check_spans(world: World, tokens: Any, spans: list[Any]) -> None:
    """What is proposed for reuse is what the tree holds: tokens, positions, labels, slots."""
    held: dict[int, tuple[int, int, int]] = {}
    for node in tree_nodes(world.engine.tree):
        ids = as_tokens(node.key.token_ids)[: len(node.key)].tolist()
        marks = [EXACT] * len(ids) if node.blend.labels is None else node.blend.labels.tolist()
        for i, slot in enumerate(node.value.tolist()):
            held[slot] = (ids[i], node.blend.start + i, marks[i])
    last = 0
    for s in spans:
        assert s.start >= last and s.length > 0, "spans overlap"
        last = s.end
        for i, slot in enumerate(s.slots.tolist()):
            token, position, label = held[slot]
            assert token == tokens[s.start + i], "a token that is not the prompt's"
            assert position == s.source_start + i, "a source position that is not the tree's"
            assert label != BLENDED, "a blended token is a source"
            assert label <= s.generation


def _check_exact_labels(world: World) -> None:
    """KV that the tree calls exact is what full prefill computes, at every layer."""
    engine = world.engine
    for node in tree_nodes(engine.tree):
        if node.children:
            continue
        path = _path(node)
        tokens = np.concatenate([as_tokens(n.key.token_ids)[: len(n.key)] for n in path]).tolist()
        labels = np.concatenate(
            [np.zeros(len(n.key)) if n.blend.labels is None else n.blend.labels for n in path]
        )
        slots = torch.cat([n.value for n in path])
        exact = np.flatnonzero(labels == EXACT)
        full = world.reference_full(tokens)
        pos = torch.arange(len(tokens))
        for layer in range(engine.layers):
            k = world.reference.rotate(full.raw[layer], pos)
            ours_k = engine.pool.get_key_buffer(layer)[slots]
            ours_v = engine.pool.get_value_buffer(layer)[slots]
            rows = exact if layer else slice(None)  # layer 0 is right whatever the label
            if layer and not len(exact):
                continue
            off = max(apart(ours_k[rows], k[rows]), apart(ours_v[rows], full.v[layer][rows]))
            assert off <= KV_FP32, f"layer {layer}: KV labelled exact is {off:.2e} off"


def _check_outcome(world: World, ask: Ask, ours: Outcome, seen: Counter) -> None:
    r = ours.report
    total = r["prefix"] + r["reused"] + r["recomputed"] + r["computed"]
    assert total == len(ask.tokens), f"{r} does not add up to {len(ask.tokens)}"
    assert r["prefix"] == ours.prefix
    planned = sum(p.blend.tokens.count for p in ours.pieces if p is not None and p.blend)
    assert r["reused"] + r["recomputed"] == planned == sum(r["sources"].values())
    full = world.plain[tuple(ask.tokens)]
    require_layer0(ours, full, f"{ask.policy}")
    seen[ask.policy or "plain"] += planned > 0
    seen["prefix"] += ours.prefix > 0
    seen["approximate prefix"] += ours.prefix > 0 and r["exact"] < ours.prefix
    seen["pieces"] += len(ours.pieces) > 1 and planned > 0
    if not ask.blend:
        assert planned == 0 and ours.labels is None and r["fallback"]
    if ask.policy == "none" and planned:
        assert r["recomputed"] == 0 and r["exact"] < len(ask.tokens), r
    elif ask.coverage and planned:
        assert r["coverage"] == ask.coverage and r["exact"] < len(ask.tokens), r
        seen["coverage"] += 0 < r["recomputed"] < planned
    elif not ask.blend or ask.policy == "all" or ask.ratio == 1.0:
        n = ask.new_tokens
        assert r["exact"] == len(ask.tokens), r
        full = Outcome(**{**vars(full), "tokens": full.tokens[:n]})
        require_equal(ours, full, f"{ask.policy} at {ask.ratio}")


def _run(world: World, traffic: list[list[dict[str, Any]]], seen: Counter) -> None:
    engine = world.engine
    batches = [[_ask(world, r) for r in batch] for batch in traffic]
    for ask in (a for batch in batches for a in batch):
        if tuple(ask.tokens) not in world.plain:
            [world.plain[tuple(ask.tokens)]] = engine.exact(Ask(ask.tokens, new_tokens=3))
    engine.flush()
    find = engine.tree.find_spans

    def checked(tokens, **kw):
        spans = find(tokens, **kw)
        _check_spans(world, tokens, spans)
        return spans

    with mock.patch.object(engine.tree, "find_spans", checked):
        for batch in batches:
            for ask, ours in zip(batch, engine.run(*batch), strict=True):
                _check_outcome(world, ask, ours, seen)
            engine.check()
            _check_index(world)
    _check_exact_labels(world)
    engine.tree.evict(EvictParams(num_tokens=engine.capacity))
    engine.check()
    assert engine.allocator.available_size() == engine.capacity, "slots leaked"
    assert len(engine.tree.index) == 0 and len(engine.tree.prompts) == 0


def _prepare(world: World) -> None:
    if not hasattr(world, "plain"):
        world.heads = [world.desk.fresh(n) if n else [] for n in HEADS]
        world.questions = [world.desk.fresh(n) for n in QUESTIONS]
        world.plain = {}


@check
def random_traffic(world: World) -> dict[str, Any]:
    """Random prompts, orders, boundaries, prefixes, batches, pieces, policies and ratios."""
    _prepare(world)
    seen: Counter = Counter()

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize=True,
        database=None,
        phases=(Phase.explicit, Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(_traffic)
    def holds(traffic):
        _run(world, traffic, seen)

    holds()
    missing = [n for n in ("all", *POLICIES, "prefix", "pieces", "coverage") if not seen[n]]
    assert not missing, f"the traffic never had: {missing} ({dict(seen)})"
    return dict(seen)


@check
def random_traffic_bites(world: World) -> dict[str, Any]:
    """Negative controls: labels that call everything exact, a leaked slot, counts one short."""
    _prepare(world)
    order = {"head": 1, "question": 1, "stated": "no", "chunks": [], "new_tokens": 1}
    traffic = [
        [{**order, "order": [0, 1], "policy": "plain", "ratio": 0.0}],
        [{**order, "order": [2, 3], "policy": "plain", "ratio": 0.0}],
        [{**order, "order": [3, 1, 2], "policy": "leading", "ratio": 0.1}],
        [{**order, "order": [1, 2, 0], "policy": "query", "ratio": 0.1}],
    ]
    run = lambda: _run(world, traffic, Counter())  # noqa: E731
    run()

    with mock.patch.object(Planner, "_label", lambda *a: None):
        must_fail("blended KV is labelled exact", run)
    world.engine.flush()

    alloc = world.engine.allocator.alloc

    def leaky(n):
        alloc(world.engine.page_size)
        return alloc(n)

    if world.engine.page_size == 1:
        with mock.patch.object(world.engine.allocator, "alloc", leaky):
            must_fail("every allocation leaks a slot", run)
        world.engine.flush()
    return {}
