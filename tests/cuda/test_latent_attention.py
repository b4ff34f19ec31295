"""The kernel that attends to a latent cache by true position, through the emulator, against softmax
in fp64 over the same values. CPU."""

from __future__ import annotations

import emulated
import pytest
import torch
from attended import BF16, FP16, Case, gapped, poisoned  # noqa: F401

from sgl_blend.errors import KernelError
from sgl_blend.ops import cuda_rows

#: shared memory of a block, which chooses the kernel's plan: sm_86's, sm_80's, sm_90's, in bytes
SHARED = (99 << 10, 163 << 10, 227 << 10)


@pytest.fixture(params=SHARED[::2], ids=lambda shared: f"{shared >> 10} KiB")
def module(request):
    """The kernels on devices with little and with much shared memory."""
    found = emulated.kernels()
    emulated.most_shared(found, request.param)
    yield found
    emulated.most_shared(found, SHARED[0])


def latent(*requests, heads=16, dim=576, value_dim=512, **more):
    """A case of a latent cache: ``heads`` query heads and one of keys."""
    return Case(*requests, heads=(heads, 1), dim=dim, value_dim=value_dim, latent=True, **more)


@pytest.mark.parametrize(("dtype", "k_dtype"), emulated.TYPES)
def test_every_type(module, dtype, k_dtype):
    """A row's heads and half of the next one's; four steps at least, the last one ragged."""
    latent((gapped(190, 197, 3), 200), heads=24, dtype=dtype, k_dtype=k_dtype).check(module)


def test_ampere_takes_a_plan_between():
    found = emulated.kernels()
    emulated.most_shared(found, SHARED[1])
    latent((gapped(60, 149, 7), 150), sinks=True).check(found)
    emulated.most_shared(found, SHARED[0])


@pytest.mark.parametrize(
    ("rows", "keys", "heads", "dim", "value_dim"),
    [
        (gapped(0, 69, 2), 70, 128, 576, 512),  # a row's heads are a tile
        (gapped(40, 149, 5), 150, 7, 288, 256),  # columns that are not there
        ([33], 40, 1, 328, 264),
    ],
)
def test_shapes(module, rows, keys, heads, dim, value_dim):
    latent((rows, keys), heads=heads, dim=dim, value_dim=value_dim).check(module)


def test_rows_see_keys_up_to_their_own_position(module):
    """At the edges of steps, where neighbours differ by one key each."""
    latent(([0, 62, 63, 64, 127, 128, 191, 192], 193), heads=3).check(module)


@pytest.mark.parametrize("window", [0, 100])
def test_window(module, window):
    """Blocks begin behind the first key; of some steps every row sees all, of others none."""
    latent((gapped(110, 300, 9), 301), window=window, heads=5).check(module)


def test_a_window_begins_where_a_step_does(module):
    """One key of the step lies before it, and the row sees the rest."""
    latent(([165], 200), window=100, heads=1).check(module)


@pytest.mark.parametrize(("cap", "sinks"), [(1.5, False), (0.0, True)])
def test_soft_cap_and_sinks(module, cap, sinks):
    latent((gapped(3, 140, 4), 150), heads=9, cap=cap, sinks=sinks).check(module)


def test_several_requests_are_one_launch(module):
    """Of none and one row, of none and one key, and rows that no key precedes."""
    case = latent(
        (gapped(5, 90, 9), 100), ([], 30), ([40], 41), ([0, 1, 2], 0), ([0], 1), heads=8,
        sinks=True,
    )  # fmt: skip
    before = module.launches()
    case.check(module)
    assert module.launches() - before == len(emulated.SCHEDULES)


def test_nothing_is_launched_for_no_rows(module):
    before = module.launches()
    latent(([], 30)).check(module)
    assert module.launches() == before


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_split_keys_are_joined(module, dtype):
    """Three parts; the short request has rows without a key in the later ones."""
    case = latent(
        ([4, 700, 760], 780), (gapped(1, 60, 3), 70), heads=2, dtype=dtype, sinks=dtype is BF16
    )
    case.check(module, parts=3)


def test_keys_begin_anywhere_and_rows_before_them_see_none(module):
    case = latent((gapped(90, 300, 8), 190), heads=5, first_pos=100)
    case.check(module)
    assert torch.isneginf(case.expected()[2]).any()


def test_keys_with_positions_of_their_own(module):
    """In any order and with holes, both in the pool and beside it."""
    at = torch.randperm(300, generator=torch.Generator().manual_seed(0))[:140]
    beside = [250, 3, 251, 249, 252]
    latent((gapped(2, 260, 7), 140), heads=3, window=90, key_pos=at, beside=beside).check(module, 2)


def test_large_scores_do_not_overflow(module):
    case = latent((gapped(50, 149, 5), 150), heads=4)
    case.q *= 200
    case.check(module)


def test_keys_are_split_where_tiles_are_few():
    pool = torch.zeros(9, 1, 576, dtype=BF16)
    keys = cuda_rows.Keys(pool, pool[..., :512], None, torch.zeros(13, 5), 16000)
    assert (keys.parts, keys._replace(longest=700).parts) == (5, 2)
    assert keys._replace(tiles=torch.zeros(40, 5)).parts == 1


def test_latents_lie_in_one_buffer():
    q, k = torch.zeros(3, 4, 576, dtype=BF16), torch.zeros(9, 1, 576, dtype=BF16)
    assert cuda_rows.attends(q, k, k[..., :512])
    for value in (k[..., 64:], k[1:, :, :512], k[..., :512].clone(), k[..., :520]):
        assert not cuda_rows.attends(q, k, value)
    assert not cuda_rows.attends(q.float(), k.float(), k.float()[..., :512])
    for dim, heads in ((584, 1), (576, 2)):
        k = torch.zeros(9, heads, dim, dtype=BF16)
        assert not cuda_rows.attends(torch.zeros(3, 4, dim, dtype=BF16), k, k[..., :512])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"k": torch.zeros(40, 2, 576, dtype=BF16)}, "one head"),
        ({"q": torch.zeros(3, 4, 584, dtype=BF16), "k": torch.zeros(40, 1, 584, dtype=BF16)},
         "at most 576"),
        ({"value_dim": 520}, "value_dim"),
        ({"value_dim": 511}, "value_dim"),
        ({"slots": torch.arange(9, dtype=torch.int32)}, "kv_slots"),
        ({"q_pos": torch.arange(4)}, "q_pos"),
    ],
)  # fmt: skip
def test_the_launcher_checks_what_it_is_given(changes, said):
    module = emulated.kernels()
    args = dict(
        q=torch.zeros(3, 4, 576, dtype=BF16),
        k=torch.zeros(40, 1, 576, dtype=BF16),
        slots=torch.arange(9),
        q_pos=torch.arange(9, 12),
        value_dim=512,
    )
    args.update(changes)
    before = module.launches()
    value = torch.zeros(40, 1, args["value_dim"], dtype=BF16)
    tiles = torch.tensor([[0, 3, 0, 9, 0]])
    keys = cuda_rows.Keys(args["k"], value, args["slots"], tiles, 9)
    with pytest.raises(KernelError, match=said):
        cuda_rows.row_attention(
            module, args["q"], args["q_pos"], [keys], scale=1.0, window=-1, logit_cap=0.0
        )
    assert module.launches() == before
