"""The correction by itself, against its formula written as loops. Needs: CPU."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels import make_rope

from sgl_blend.engine.forward.pool import LatentPool, ModelPool
from sgl_blend.ops.reference import rotate
from sgl_blend.prefill.attention import Arriving, BatchAttention, KvCopy
from sgl_blend.prefill.correction import Correction, PoolSource, Recomputed
from sgl_blend.prefill.pieces import HostSources
from sgl_blend.prefill.running import BlendPass

SLOTS, DIM = 120, 8


class Buffers:
    """SGLang's pool of one layer's kind, as far as it is read."""

    def __init__(self, dtype: torch.dtype, seed: int, layers: int = 2) -> None:
        gen = torch.Generator().manual_seed(seed)
        make = lambda: torch.randn(SLOTS, 2, DIM, generator=gen).to(dtype)  # noqa: E731
        self.k = [make() for _ in range(layers)]
        self.v = [make() for _ in range(layers)]

    def get_key_buffer(self, layer: int) -> torch.Tensor:
        return self.k[layer]

    def get_value_buffer(self, layer: int) -> torch.Tensor:
        return self.v[layer]


class Tokens:
    """40 reused tokens of four documents at slots 40 to 79, whose sources lie at 0 to 39."""

    def __init__(self, seed: int, recomputed: list[int]) -> None:
        gen = torch.Generator().manual_seed(seed)
        self.document = torch.tensor([0] * 10 + [1] * 3 + [2] * 17 + [3] * 10)
        self.source, self.slots = torch.arange(40), torch.arange(40, 80)
        self.old = torch.randint(0, 2000, (40,), generator=gen)
        self.new = torch.randint(0, 2000, (40,), generator=gen)
        self.runs = torch.tensor(recomputed, dtype=torch.int64)
        self.rest = torch.tensor([i for i in range(40) if i not in recomputed])

    def recomputed(self, strength: float = 1.0) -> Recomputed:
        r = self.runs
        source = PoolSource(self.source[r])
        places = (self.slots[r], self.new[r], source, self.old[r], self.document[r])
        return Recomputed(*places, documents=4, strength=strength)

    def arriving(self, first: int = 0, document: int = 0) -> Arriving:
        r = self.rest
        copy = KvCopy(self.source[r], self.slots[r], self.old[r], self.new[r])
        return Arriving(copy, first, (self.document[r] + document).int())


def _expected(t: Tokens, k, v, rope, strength: float) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V of slots 40 to 79, in fp64, token by token."""

    def turn(x: torch.Tensor, position: int) -> torch.Tensor:
        if rope is None:
            return x
        cos, sin = rope.cos_sin[position].double().chunk(2)
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

    def back(x: torch.Tensor, position: int) -> torch.Tensor:
        if rope is None:
            return x
        cos, sin = rope.cos_sin[position].double().chunk(2)
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * cos + b * sin, b * cos - a * sin], dim=-1)

    k, v = k.double(), v.double()
    out_k, out_v = k[40:80].clone(), v[40:80].clone()
    for i in t.rest.tolist():
        mine = [j for j in t.runs.tolist() if t.document[j] == t.document[i]]
        shift_k, shift_v = torch.zeros(2, k.shape[2]).double(), torch.zeros(2, v.shape[2]).double()
        for j in mine:
            shift_k += back(k[40 + j], int(t.new[j])) - back(k[j], int(t.old[j]))
            shift_v += v[40 + j] - v[j]
        n = max(len(mine), 1) / strength
        out_k[i] = turn(back(k[i], int(t.old[i])) + shift_k / n, int(t.new[i]))
        out_v[i] = v[i] + shift_v / n
    return out_k, out_v


def _bring_in(pool, arriving, pieces, layer=1) -> None:
    BatchAttention(pool, [], arriving, None, Correction(pieces)).bring_in(layer)


@settings(deadline=None, max_examples=40)
@given(
    recomputed=st.sets(st.integers(0, 39), min_size=1, max_size=39).map(sorted),
    strength=st.sampled_from((1.0, 0.7)),
    seed=st.integers(0, 99),
    turned=st.booleans(),
)
def test_each_document_is_shifted_by_the_mean_of_its_own(recomputed, strength, seed, turned):
    """Documents without a recomputed token are copied as they are; nothing else is written."""
    buffers, t = Buffers(torch.float32, seed), Tokens(seed, recomputed)
    rope = make_rope(DIM, True) if turned else None
    pool = ModelPool(buffers, [rope, rope], 4096)
    k, v = buffers.k[1].clone(), buffers.v[1].clone()
    want_k, want_v = _expected(t, k, v, rope, strength)
    _bring_in(pool, [t.arriving()], [t.recomputed(strength)])
    torch.testing.assert_close(buffers.k[1][40:80].double(), want_k, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(buffers.v[1][40:80].double(), want_v, atol=1e-5, rtol=1e-5)
    lost = [d for d in range(4) if not (t.document[t.runs] == d).any()]
    for i in t.rest[torch.isin(t.document[t.rest], torch.tensor(lost))].tolist():
        assert torch.equal(buffers.v[1][40 + i], v[i])
    others = torch.ones(SLOTS, dtype=torch.bool)
    others[40 + t.rest] = False
    assert torch.equal(buffers.k[1][others], k[others])
    assert torch.equal(buffers.v[1][others], v[others])


def test_layer_0_is_left_alone_and_bringing_in_twice_changes_nothing():
    buffers, t = Buffers(torch.float32, 1), Tokens(1, [2, 5, 11, 39])
    pool = ModelPool(buffers, [make_rope(DIM, True)] * 2, 4096)
    source = buffers.v[0][t.rest].clone()
    _bring_in(pool, [t.arriving()], [t.recomputed()], layer=0)
    assert torch.equal(buffers.v[0][40 + t.rest], source)
    _bring_in(pool, [t.arriving()], [t.recomputed()])
    once = buffers.k[1].clone(), buffers.v[1].clone()
    _bring_in(pool, [t.arriving()], [t.recomputed()])
    assert torch.equal(buffers.k[1], once[0]) and torch.equal(buffers.v[1], once[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_where_cached_kv_is_exact_nothing_is_shifted(dtype):
    """Up to rounding: what the rows have computed is their source, moved."""
    buffers, t = Buffers(dtype, 2), Tokens(2, list(range(0, 40, 3)))
    rope = make_rope(DIM, True)
    pool = ModelPool(buffers, [rope] * 2, 4096)
    everything = KvCopy(t.source, t.slots, t.old, t.new)
    everything.run(pool, 1)
    before = buffers.k[1].clone(), buffers.v[1].clone()
    _bring_in(pool, [t.arriving()], [t.recomputed()])
    # V is the same to the bit; K was turned, and its rounding averages out.
    assert torch.equal(buffers.v[1], before[1])
    off = (buffers.k[1] - before[0]).abs().max()
    assert off <= 4 * torch.finfo(dtype).eps, off


def test_pieces_of_a_batch_are_corrected_each_by_its_own():
    """Two pieces in one pass, the second at other slots, with other strengths; tokens of a third,
    which is not corrected, among them."""
    buffers = Buffers(torch.float32, 3)
    rope = make_rope(DIM, True)
    pool = ModelPool(buffers, [rope] * 2, 4096)
    a, b = Tokens(3, [1, 4, 12, 20]), Tokens(4, [0, 35])
    b.slots = b.slots + 40
    k, v = buffers.k[1].clone(), buffers.v[1].clone()
    want_a = _expected(a, k, v, rope, 1.0)
    moved = torch.cat([k[:40], k[80:120]]), torch.cat([v[:40], v[80:120]])
    want_b = _expected(b, *moved, rope, 0.5)
    parts = Arriving.together([a.arriving(), b.arriving(document=4)])
    assert len(parts) == 1
    _bring_in(pool, parts, [a.recomputed(), b.recomputed(0.5)])
    for want, at in ((want_a, 40), (want_b, 80)):
        torch.testing.assert_close(buffers.k[1][at : at + 40].double(), want[0], atol=2e-5, rtol=0)
        torch.testing.assert_close(buffers.v[1][at : at + 40].double(), want[1], atol=1e-5, rtol=0)


def test_copies_that_are_not_alike_stay_apart():
    t = Tokens(5, [0])
    plain, corrected = t.arriving(), t.arriving()
    plain.document = None
    late, over = t.arriving(first=2), t.arriving()
    over.runs = torch.ones(len(t.rest), dtype=torch.uint8)
    kind = lambda p: (p.first, p.document is not None, p.runs is not None)  # noqa: E731
    parts = [late, plain, corrected, over]
    got = Arriving.together(parts)
    assert sorted(map(kind, parts)) == sorted(map(kind, got))
    assert [p.first for p in got] == [0, 0, 0, 2]


def test_a_latent_caches_parts_are_corrected_alike():
    """What is rotated of a vector, and its latent, which is K's and V's."""
    rank = 5
    gen = torch.Generator().manual_seed(6)
    whole = torch.randn(SLOTS, 2, rank + DIM, generator=gen)
    buffers = Buffers(torch.float32, 6)
    buffers.k[1], buffers.v[1] = whole, whole[..., :rank]
    rope, t = make_rope(DIM, True), Tokens(6, [3, 9, 13, 30])
    pool = LatentPool(buffers, [rope] * 2, 4096)
    want_k, want_v = _expected(t, whole[..., rank:].clone(), whole[..., :rank].clone(), rope, 1.0)
    _bring_in(pool, [t.arriving()], [t.recomputed()])
    torch.testing.assert_close(whole[40:80, :, rank:].double(), want_k, atol=2e-5, rtol=0)
    torch.testing.assert_close(whole[40:80, :, :rank].double(), want_v, atol=1e-5, rtol=0)


class _Host:
    """KV of tokens outside the pool."""

    def __init__(self, k, v) -> None:
        self.k, self.v = k, v

    def take(self, pool, layer, index):
        return self.k[index], self.v[index]


@pytest.mark.parametrize("inside", [list(range(0, 40, 2)), []])
def test_sources_in_the_pool_and_on_the_host_are_told_apart(inside):
    """Which recomputed tokens come from where is found without looking at the choice on the host;
    the host holds other tokens besides."""
    buffers, t = Buffers(torch.float32, 7), Tokens(7, [0, 1, 2, 9, 38, 39])
    pool = ModelPool(buffers, [None, None], 4096)
    outside = [i for i in range(40) if i not in inside]
    host_index, host_tokens = torch.tensor(outside), torch.arange(len(outside)) + 3
    k, v = (torch.zeros(len(outside) + 3, 2, DIM) for _ in "kv")
    k[3:], v[3:] = buffers.k[1][t.source[host_index]], buffers.v[1][t.source[host_index]]
    host = HostSources(
        _Host(k, v), torch.arange(3), 3, torch.tensor(inside).long(), host_index, host_tokens
    )
    blend = SimpleNamespace(src_slots=t.source.index_fill(0, host_index, -1))
    mixed = BlendPass.mixed(SimpleNamespace(blend=blend, alive=t.runs), host)
    got_k, got_v, index = mixed.read(pool, 1)
    assert index.tolist() == list(range(len(t.runs)))
    assert torch.equal(got_k, buffers.k[1][t.source[t.runs]])
    assert torch.equal(got_v, buffers.v[1][t.source[t.runs]])
    assert [x in inside for x in t.runs.tolist()] == (mixed.pool_slots() >= 0).tolist()


def test_whoever_watches_is_given_each_layers_deltas():
    buffers, t = Buffers(torch.float32, 8), Tokens(8, [0, 12, 13])
    rope = make_rope(DIM, True)
    pool = ModelPool(buffers, [rope] * 2, 4096)
    correction, seen = Correction([t.recomputed(0.7)]), {}
    correction.watch = seen.__setitem__
    correction.shifts(pool, 1)
    assert list(seen) == [1]
    deltas = seen[1]
    assert torch.equal(deltas.v, buffers.v[1][t.slots[t.runs]] - buffers.v[1][t.runs])
    zero = torch.zeros_like(t.runs)
    fresh = rotate(buffers.k[1][t.slots[t.runs]], *rope.delta(t.new[t.runs], zero), DIM, True)
    cached = rotate(buffers.k[1][t.runs], *rope.delta(t.old[t.runs], zero), DIM, True)
    torch.testing.assert_close(deltas.k, fresh - cached)
    assert correction.members.tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 0]]
