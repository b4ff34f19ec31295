"""The kernels that attend to keys by true position, through the emulator, against softmax in fp64
over the same values. CPU."""

from __future__ import annotations

import math

import emulated
import pytest
import torch
from attended import BF16, FP16, Case, gapped, poisoned  # noqa: F401

from sgl_blend.errors import KernelError
from sgl_blend.ops import cuda_rows


@pytest.fixture(scope="module")
def module():
    return emulated.kernels()


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


@pytest.mark.parametrize("cap", [0.0, 1.5])
def test_scale_zero_weighs_alike_what_a_row_sees(module, cap):
    """What is hidden scores minus infinity, of which zero times would be NaN. In parts, too."""
    case = Case((gapped(3, 140, 12), 150), window=40, cap=cap, sinks=True, beside=[139, 20, 3])
    case.how["scale"] = 0.0
    case.check(module, parts=2)


@pytest.mark.parametrize("scale", [-1.0, math.nan])
def test_scales_below_zero_are_refused(module, scale):
    case = Case(([3], 9))
    case.how["scale"] = scale
    with pytest.raises(KernelError, match="scale: expected 0 or more"):
        case.check(module)


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


@pytest.mark.parametrize("window", [-1, 100])
def test_several_requests_with_positions_of_their_own(module, window):
    """Each over its own list, one of which is empty. Rows of the first one see not all keys of any
    step; those of the last one keys behind the place in the list that is their position."""
    at = torch.randperm(300, generator=torch.Generator().manual_seed(1))[:250]
    requests = (gapped(240, 260, 9), 90), ([300, 301], 0), (gapped(20, 60, 7), 160)
    Case(*requests, heads=(4, 2), window=window, key_pos=at, sinks=True).check(module)


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
