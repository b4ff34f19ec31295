"""The kernel that averages what recomputed tokens differ by, through the emulator, against torch in
fp32. CPU."""

from __future__ import annotations

import emulated
import pytest
import torch
from kernels import POOL_DTYPES, make_rope

from sgl_blend.errors import KernelError
from sgl_blend.ops import deltas, reference

BF16, SLOTS, NONE = torch.bfloat16, 160, 77.0


@pytest.fixture(scope="module")
def module():
    return emulated.kernels()


@pytest.fixture(autouse=True)
def served(monkeypatch, module):
    emulated.serve(monkeypatch, lambda device: module, ("deltas",))


class Case:
    """Documents of so many recomputed tokens, whose cached KV lies elsewhere in the pool or, of
    every third token where ``hosted``, beside it."""

    def __init__(self, counts, heads, dim, v_dim, rotary_dim, neox, dtype, hosted=False):
        gen = torch.Generator().manual_seed(dim + sum(counts))
        n = sum(counts)
        make = lambda *shape: (torch.randn(*shape, generator=gen) * 3).to(dtype)  # noqa: E731
        self.k, self.v = make(SLOTS, heads, dim), make(SLOTS, heads, v_dim)
        order = torch.randperm(SLOTS, generator=gen)
        self.fresh, self.old = order[:n].contiguous(), order[SLOTS - n :].flip(0).contiguous()
        # What nobody is to read.
        unread = torch.ones(SLOTS, dtype=torch.bool)
        unread[self.fresh] = False
        self.beside = (make(n, heads, dim), make(n, heads, v_dim)) if hosted else None
        self.cached = self.old.clone()
        if hosted:
            self.cached[::3] = -1
        unread[self.cached[self.cached >= 0]] = False
        for pool in (self.k, self.v):
            reference.put(pool, unread.nonzero()[:, 0], torch.full_like(pool[unread], torch.nan))
        self.bounds = torch.tensor([0, *counts]).cumsum(0)
        self.scale = torch.rand(len(counts), generator=gen)
        self.how, self.turns = (rotary_dim, neox), None
        if rotary_dim:
            rope = make_rope(rotary_dim, neox)
            at, was = torch.randint(0, 4096, (2, n), generator=gen)
            self.turns = tuple(rope.delta(x, torch.zeros_like(x)) for x in (at, was))

    def wanted(self):
        k, v = self.k[self.fresh].float(), self.v[self.fresh].float()
        there = self.cached.clamp(min=0)
        old = [self.k[there].float(), self.v[there].float()]
        if self.beside is not None:
            pick = (self.cached < 0)[:, None, None]
            old = [torch.where(pick, b.float(), x) for b, x in zip(self.beside, old, strict=True)]
        if self.turns is not None:
            k = reference.rotate(k, *self.turns[0], *self.how)
            old[0] = reference.rotate(old[0], *self.turns[1], *self.how)
        out = []
        for delta in (k - old[0], v - old[1]):
            parts = delta.double().split(self.bounds.diff().tolist())
            out.append(torch.stack([x.sum(0) * s for x, s in zip(parts, self.scale, strict=True)]))
        return out

    def run(self, before=1):
        """The means; ``before`` documents of others lie in front of them, and one behind."""
        all_documents = len(self.scale) + before + 1
        out = [torch.full((all_documents, *x.shape[1:]), NONE) for x in (self.k, self.v)]
        of = deltas.Averaged(self.fresh, self.cached, self.bounds, self.scale)
        deltas.mean_deltas(of, self.k, self.v, self.beside, self.turns, *self.how, out, before)
        for x in out:
            assert torch.all(x[:before] == NONE) and torch.all(x[-1] == NONE)
        return [x[before:-1] for x in out]

    def check(self, module):
        want, first = self.wanted(), None
        for way in emulated.schedules(module):
            got = self.run()
            for ours, theirs in zip(got, want, strict=True):
                torch.testing.assert_close(ours.double(), theirs, atol=2e-5, rtol=1e-5, msg=way)
            first = first or got
            assert all(map(torch.equal, got, first)), f"the order of sums is fixed, {way}"


@pytest.mark.parametrize("neox", [True, False], ids=["halves", "pairs"])
@pytest.mark.parametrize("dtype", POOL_DTYPES)
def test_the_mean_of_each_document(module, dtype, neox):
    """One of them has no token, one more than a block takes at a time, three times over."""
    Case((3, 0, 70, 1), 2, 96, 64, 64, neox, dtype).check(module)


@pytest.mark.parametrize(
    ("heads", "dim", "v_dim", "rotary_dim"),
    [(1, 16, 8, 16), (8, 128, 128, 128), (3, 80, 8, 80), (1, 64, 512, 64), (2, 64, 64, 0)],
)
def test_shapes(module, heads, dim, v_dim, rotary_dim):
    Case((5, 33), heads, dim, v_dim, rotary_dim, True, BF16).check(module)


@pytest.mark.parametrize("dtype", [BF16, torch.float8_e4m3fn])
def test_cached_kv_beside_the_pool(module, dtype):
    Case((20, 50), 2, 64, 32, 32, True, dtype, hosted=True).check(module)


def test_no_recomputed_token_at_all(module):
    case = Case((0, 0), 2, 64, 64, 64, True, BF16)
    assert all(not x.any() for x in case.run())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"k": torch.zeros(SLOTS, 2, 68, dtype=BF16)[..., :64]}, "rows of 16 bytes"),
        ({"v": torch.zeros(SLOTS, 2, 64)}, "dtype"),
        ({"fresh": torch.arange(7)}, "old slots"),
        ({"cached": torch.arange(8).int()}, "old slots"),
        ({"turns": None}, "cos, sin"),
        ({"bounds": torch.arange(4)}, "bounds"),
        ({"scale": torch.ones(2).double()}, "scale"),
        ({"how": (40, True)}, "rotary_dim"),
    ],
)
def test_the_launcher_checks_what_it_is_given(module, changes, said):
    case = Case((3, 5), 2, 64, 64, 64, True, BF16)
    for name, value in changes.items():
        setattr(case, name, value)
    before = module.launches()
    with pytest.raises(KernelError, match=said):
        case.run()
    assert module.launches() == before
