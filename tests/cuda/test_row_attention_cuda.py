"""The kernels that attend to keys by true position, through the emulator, against softmax in fp64
over the same values. CPU."""

from __future__ import annotations

import math

import emulated
import pytest
import torch

from sgl_blend.errors import KernelError
from sgl_blend.ops import cuda_rows
from sgl_blend.ops.reference import visible

BF16, FP16 = torch.bfloat16, torch.float16
#: relative error of one rounding: of a probability before it meets its value, and of the output
ROUNDING = {BF16: 2**-8, FP16: 2**-11}
#: the step between fp16's smallest numbers
LEAST = 2**-24
MARGIN = 64


@pytest.fixture(scope="module")
def module():
    return emulated.kernels()


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Floating memory that is handed out empty is NaN, and stays so before and behind it."""
    empty, given = torch.empty, []

    def guarded(shape, *args, **kwargs):
        if not isinstance(shape, tuple) or not kwargs["dtype"].is_floating_point:
            return empty(shape, *args, **kwargs)
        numel = math.prod(shape)
        whole = empty(numel + 2 * MARGIN, *args, **kwargs).fill_(torch.nan)
        given.append(whole)
        return whole[MARGIN : MARGIN + numel].view(shape)

    monkeypatch.setattr(torch, "empty", guarded)
    yield
    for whole in given:
        assert whole[:MARGIN].isnan().all() and whole[-MARGIN:].isnan().all()


class Case:
    """Rows at ``positions`` of each of ``requests`` over so many keys, whose slots lie in no order.

    requests: (positions, keys) each. beside: keys outside the pool, of the only request, in any
    order: (positions, and where they lie within wider rows).
    """

    def __init__(
        self, *requests, heads=(4, 1), dim=64, value_dim=None, dtype=BF16, k_dtype=None,
        window=-1, cap=0.0, sinks=False, first_pos=0, key_pos=None, beside=(),
    ):  # fmt: skip
        gen = torch.Generator().manual_seed(dim + len(requests))
        (q_heads, kv_heads), value_dim = heads, value_dim or dim
        self.rows, self.keys = [len(p) for p, _ in requests], [n for _, n in requests]
        self.positions = [torch.as_tensor(p, dtype=torch.int64) for p, _ in requests]
        # Rows of a projection to queries, keys and values together.
        wide = torch.randn(sum(self.rows), 3 * q_heads * dim, generator=gen).to(dtype)
        self.q = wide[:, : q_heads * dim].unflatten(1, (q_heads, dim))
        total = sum(self.keys)
        # One slot before the first and one behind the last are poison.
        self.slots = torch.randperm(total + 7, generator=gen)[:total] + 1
        k, v = (torch.randn(total + 9, kv_heads, d, generator=gen) for d in (dim, value_dim))
        k[0] = k[-1] = v[0] = v[-1] = torch.nan
        self.k, self.v = k.to(k_dtype or dtype), v.to(k_dtype or dtype)
        self.beside = torch.tensor(beside, dtype=torch.int64)
        self.own = [
            torch.randn(len(beside), 3, kv_heads, d, generator=gen).to(k_dtype or dtype)[:, 1]
            for d in (dim, value_dim)
        ]
        self.sinks = torch.randn(q_heads, generator=gen) * 3 if sinks else None
        self.how = dict(scale=dim**-0.5, window=window, logit_cap=cap)
        self.first_pos, self.key_pos = first_pos, key_pos
        self.group = q_heads // kv_heads

    def expected(self):
        """Output and log-sum-exp, fp64, and how long a row's values are on average."""
        made, row, key = [], 0, 0
        for pos, n in zip(self.positions, self.keys, strict=True):
            at = torch.arange(n) + self.first_pos if self.key_pos is None else self.key_pos
            at = torch.cat((at, self.beside))
            mine = self.slots[key : key + n]
            k, v = (
                torch.cat((pool[mine].double(), own.double())).repeat_interleave(self.group, 1)
                for pool, own in zip((self.k, self.v), self.own, strict=True)
            )
            scores = torch.einsum("rhd,nhd->rhn", self.q[row : row + len(pos)].double(), k)
            scores, cap = scores * self.how["scale"], self.how["logit_cap"]
            if cap:
                scores = cap * torch.tanh(scores / cap)
            hidden = ~visible(pos, at, self.how["window"])[:, None]
            scores = scores.masked_fill(hidden, -math.inf)
            lse = scores.logsumexp(-1)
            if self.sinks is not None:
                lse = torch.logaddexp(lse, self.sinks.double())
            probs = torch.exp(scores - lse[..., None]).masked_fill(hidden, 0.0)
            made.append([torch.einsum("rhn,nhd->rhd", probs, x) for x in (v, v.abs())] + [lse])
            row, key = row + len(pos), key + n
        out, length, lse = (torch.cat(x) for x in zip(*made, strict=True))
        return out, length, lse

    def over(self):
        tiles = torch.from_numpy(cuda_rows.tiles_of(self.rows, self.keys, self.group))
        pool = cuda_rows.Keys(
            self.k, self.v, self.slots, tiles, max(self.keys), self.first_pos, self.key_pos
        )
        if not len(self.beside):
            return [pool]
        return [pool, cuda_rows.one_request(self.q, *self.own, None, 0, self.beside)]

    def check(self, module, parts=1, with_lse=True):
        over = self.over()
        assert sum(keys.parts for keys in over) == parts
        out, length, lse = self.expected()
        rounding, first = ROUNDING[self.q.dtype], None
        for way in emulated.schedules(module):
            got = cuda_rows.row_attention(
                module, self.q, torch.cat(self.positions), over,
                **self.how, sinks=self.sinks, with_lse=with_lse,
            )  # fmt: skip
            first = first or got
            assert torch.equal(got.out, first.out), f"other sums: {way}"
            off = (got.out.double() - out).abs()
            beyond = off - rounding * (length + out.abs()) - 1e-5 * length - LEAST
            assert bool((beyond <= 0).all()), f"{way}: {beyond.max():.2g} beyond rounding"
            if with_lse:
                torch.testing.assert_close(got.lse.double(), lse, rtol=1e-5, atol=1e-4, msg=way)
            else:
                assert got.lse is None


def gapped(first, last, n):
    """``n`` positions in first..last, with holes and repeats."""
    return torch.linspace(first, last, n).long().tolist()


@pytest.mark.parametrize(("dtype", "k_dtype"), emulated.TYPES)
def test_every_type(module, dtype, k_dtype):
    """Two tiles, the second one ragged; four steps, the last one ragged. The queries' rows lie
    within wider ones."""
    Case((gapped(90, 198, 20), 200), dtype=dtype, k_dtype=k_dtype).check(module)


@pytest.mark.parametrize(
    ("rows", "keys", "heads", "dim", "value_dim"),
    [
        (gapped(0, 129, 10), 130, (7, 1), 16, 16),  # a group that fills no tile
        (gapped(60, 149, 9), 150, (4, 2), 80, 96),
        (gapped(80, 195, 17), 200, (8, 2), 128, 128),
        (gapped(30, 131, 34), 132, (2, 1), 256, 256),  # both halves of a tile
        (gapped(10, 99, 5), 100, (3, 3), 192, 128),
    ],
)
def test_shapes(module, rows, keys, heads, dim, value_dim):
    Case((rows, keys), heads=heads, dim=dim, value_dim=value_dim).check(module)


@pytest.mark.parametrize("first", [0, 62, 63])
def test_rows_see_keys_up_to_their_own_position(module, first):
    """At the edges of steps, where neighbours differ by one key each."""
    rows = [first, 63, 64, 65, 127, 128, 128, 191, 192]
    Case((rows, 193), heads=(1, 1)).check(module)


@pytest.mark.parametrize("window", [0, 5, 100, 250])
def test_window(module, window):
    """Tiles begin behind the first key; of some steps every row sees all, of others none."""
    Case((gapped(110, 300, 24), 301), window=window, heads=(2, 1)).check(module)


def test_a_window_begins_where_a_step_does(module):
    """One key of the step lies before it, and the row sees the rest."""
    Case(([165], 200), window=100, heads=(1, 1)).check(module)


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("cap", [0.0, 1.5])
def test_soft_cap_and_sinks(module, cap, sinks):
    Case((gapped(3, 140, 12), 150), heads=(4, 2), cap=cap, sinks=sinks).check(module)


def test_several_requests_are_one_launch(module):
    """Of none and one row, of none and one key, and rows that no key precedes."""
    case = Case(
        (gapped(5, 90, 18), 100), ([], 30), ([40], 41), ([0, 1, 2], 0), ([0], 1),
        (gapped(100, 250, 21), 260), heads=(4, 2), sinks=True,
    )  # fmt: skip
    before = module.launches()
    case.check(module)
    assert module.launches() - before == len(emulated.SCHEDULES)


def test_nothing_is_launched_for_no_rows(module):
    before = module.launches()
    case = Case(([], 30))
    case.check(module)
    assert module.launches() == before


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("sinks", [False, True])
def test_split_keys_are_joined(module, dtype, sinks):
    """Three parts of five steps; the short request has rows without a key in the later ones."""
    case = Case(
        ([4, 700, 760], 780), (gapped(1, 60, 4), 70), heads=(2, 1), dtype=dtype, sinks=sinks
    )
    case.check(module, parts=3)
    case.check(module, parts=3, with_lse=False)


def test_split_keys_under_a_window(module):
    Case((gapped(500, 779, 5), 780), window=300, heads=(2, 1), sinks=True).check(module, parts=3)


def test_keys_begin_anywhere_and_rows_before_them_see_none(module):
    case = Case((gapped(90, 300, 14), 190), first_pos=100)
    case.check(module)
    assert torch.isneginf(case.expected()[2]).any()


@pytest.mark.parametrize("window", [-1, 40])
def test_keys_with_positions_of_their_own(module, window):
    """In any order and with holes, both in the pool and beside it."""
    at = torch.randperm(300, generator=torch.Generator().manual_seed(0))[:200]
    beside = [250, 3, 251, 249, 252]
    case = Case((gapped(2, 260, 11), 200), window=window, key_pos=at, beside=beside, sinks=True)
    case.check(module, parts=2)


def test_large_scores_do_not_overflow(module):
    case = Case((gapped(50, 199, 8), 200), sinks=True)
    case.q *= 200
    for high in (4000.0, -4000.0):
        case.sinks.fill_(high)
        case.check(module)


def test_tiles_hold_every_row_once_and_the_longest_come_first():
    tiles = cuda_rows.tiles_of([40, 0, 3, 1], [500, 9, 1000, 0], 7)
    assert tiles.tolist() == [
        [40, 3, 509, 1000, 0],
        *([0, 40, 0, 500, begin] for begin in (256, 128, 0)),
        [43, 1, 1509, 0, 0],
    ]
    assert cuda_rows.tiles_of([0], [10], 2).shape == (0, 5)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"q": torch.zeros(3, 4, 64)}, "q: expected bfloat16 or float16"),
        ({"q": torch.zeros(3, 4, 32, dtype=BF16)}, "head size"),
        ({"q": torch.zeros(3, 3, 64, dtype=BF16)}, "multiple of k's heads"),
        ({"q": torch.zeros(3, 4, 65, dtype=BF16)[..., 1:]}, "q: rows of 16 bytes"),
        ({"k": torch.zeros(40, 2, 64, dtype=FP16)}, "v: of k's slots"),
        ({"k": torch.zeros(40, 2, 68, dtype=BF16)[..., :64]}, "k: .*rows of 16 bytes"),
        ({"v": torch.zeros(40, 2, 68, dtype=BF16)[..., :64]}, "v: .*rows of 16 bytes"),
        ({"v": torch.zeros(39, 2, 64, dtype=BF16)}, "v: of k's slots"),
        ({"v": torch.zeros(40, 2, 264, dtype=BF16)}, "at most 256"),
        ({"slots": torch.arange(9, dtype=torch.int32)}, "kv_slots"),
        ({"q_pos": torch.arange(4)}, "q_pos"),
        ({"key_pos": torch.arange(8)}, "key_pos"),
        ({"tiles": torch.zeros(1, 4, dtype=torch.int64)}, "tiles"),
        ({"tiles": torch.zeros(1, 5, dtype=torch.int32)}, "tiles"),
        ({"sinks": torch.zeros(3)}, "sinks"),
    ],
)
def test_launchers_check_what_they_are_given(module, changes, said):
    args = dict(
        q=torch.zeros(3, 4, 64, dtype=BF16),
        k=torch.zeros(40, 2, 64, dtype=BF16),
        v=torch.zeros(40, 2, 64, dtype=BF16),
        slots=torch.arange(9),
        q_pos=torch.arange(9, 12),
        key_pos=None,
        tiles=torch.tensor([[0, 3, 0, 9, 0]]),
        sinks=None,
    )
    args.update(changes)
    before = module.launches()
    keys = cuda_rows.Keys(args["k"], args["v"], args["slots"], args["tiles"], 9, 0, args["key_pos"])
    with pytest.raises(KernelError, match=said):
        cuda_rows.row_attention(
            module, args["q"], args["q_pos"], [keys],
            scale=1.0, window=-1, logit_cap=0.0, sinks=args["sinks"],
        )  # fmt: skip
    assert module.launches() == before
