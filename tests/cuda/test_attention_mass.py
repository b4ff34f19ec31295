"""The kernel that sums the question's attention over cached keys, through the emulator, against
torch in fp32 over the same values. CPU."""

from __future__ import annotations

import math

import emulated
import pytest
import torch

from sgl_blend.errors import KernelError
from sgl_blend.ops import cuda
from sgl_blend.ops.reference import visible

BF16, FP16 = torch.bfloat16, torch.float16


@pytest.fixture(scope="module")
def module():
    return emulated.kernels()


def poisoned(x):
    """``x``, with NaN behind its end."""
    return torch.cat((x, torch.full_like(x[:1], math.nan)))[:-1]


class Case:
    """``rows`` queries behind ``keys`` cached keys, whose slots lie in no order."""

    def __init__(self, rows, keys, q_heads, kv_heads, dim, q_dtype=BF16, k_dtype=None, **options):
        gen = torch.Generator().manual_seed(rows + keys)
        self.q = poisoned(torch.randn(rows, q_heads, dim, generator=gen).to(q_dtype))
        # One slot before the first and one behind the last are poison.
        k = torch.randn(keys + 9, kv_heads, dim, generator=gen)
        self.slots = torch.randperm(keys + 7, generator=gen)[:keys] + 1
        v = torch.randn(keys + 9, kv_heads, 80, generator=gen)  # more than a tile of 64
        k[0] = k[-1] = v[0] = v[-1] = torch.nan
        self.k, self.v = (x.to(k_dtype or q_dtype) for x in (k, v))
        self.weights = poisoned(torch.rand(rows, generator=gen))
        self.q_pos = torch.arange(keys, keys + rows)
        self.options = dict(
            scale=dim**-0.5, window=-1, logit_cap=0.0, kv_pos0=0, key_pos=None, **options
        )
        self.group = q_heads // kv_heads

    def scores(self):
        """[rows, heads, keys], -inf where a row does not see a key."""
        o = self.options
        k = self.k[self.slots].float().repeat_interleave(self.group, 1)
        s = torch.einsum("rhd,nhd->rhn", self.q.float(), k) * o["scale"]
        if o["logit_cap"]:
            s = o["logit_cap"] * torch.tanh(s / o["logit_cap"])
        pos = o["key_pos"]
        pos = torch.arange(len(self.slots)) + o["kv_pos0"] if pos is None else pos
        hidden = ~visible(self.q_pos, pos, o["window"])
        return s.masked_fill(hidden[:, None], -math.inf)

    def check(self, module, more=0.0):
        """more: logit of what takes its share beside the keys (sinks, extra keys)."""
        scores = self.scores()
        lse = torch.logaddexp(scores.logsumexp(-1), torch.tensor(more or -math.inf))
        by_row = (torch.exp(scores - lse[..., None]) * self.weights[:, None, None]).sum(0)
        by_head = by_row.view(-1, self.group, len(self.slots)).sum(1)
        want, norms = by_head.sum(0), self.v[self.slots].float().norm(dim=2).T
        lse = poisoned(lse)
        for way in emulated.schedules(module):
            got = cuda.attention_mass(
                module, self.q, self.k, self.slots, self.q_pos, lse, self.weights, **self.options
            )
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-7, msg=way)
            self.check_sums(module, lse, by_head, norms, way)

    def check_sums(self, module, lse, by_head, norms, way):
        """Of two layers: by value, and as it is."""
        sums, late = by_head.new_zeros(2, *by_head.shape)
        for unit in (0.25, 0.5):
            cuda.add_mass(
                module, self.q, self.k, self.v, self.slots, self.q_pos, lse, self.weights, sums,
                late, value_unit=unit, **self.options,
            )  # fmt: skip
        torch.testing.assert_close(sums, by_head * norms * 0.75, rtol=2e-4, atol=1e-6, msg=way)
        torch.testing.assert_close(late, by_head * 2, rtol=1e-4, atol=1e-7, msg=way)


@pytest.mark.parametrize(("q_dtype", "k_dtype"), emulated.TYPES)
def test_every_type(module, q_dtype, k_dtype):
    """67 rows of 4 query heads a key head: five steps, the last one ragged."""
    Case(67, 70, 4, 1, 64, q_dtype, k_dtype).check(module)


@pytest.mark.parametrize(
    ("rows", "keys", "q_heads", "kv_heads", "dim"),
    [
        (1, 1, 1, 1, 64),
        (25, 64, 8, 2, 128),
        (17, 66, 7, 1, 80),  # a group that fills no step, a head that fills no tile
        (101, 20, 2, 2, 256),
        (3, 130, 12, 3, 16),
        (9, 65, 10, 1, 200),
        (3, 40, 256, 256, 16),  # enough blocks for all of their warps
        (5, 70, 12, 1, 576),  # a latent cache's
        (3, 18, 7, 1, 288),
    ],
)
def test_shapes(module, rows, keys, q_heads, kv_heads, dim):
    Case(rows, keys, q_heads, kv_heads, dim).check(module, more=0.7)


def test_soft_cap(module):
    case = Case(20, 40, 4, 2, 64)
    case.options["logit_cap"] = 1.5
    case.check(module)


def test_scale_zero(module):
    case = Case(20, 40, 4, 2, 64)
    case.options["scale"] = 0.0
    case.check(module)


def test_rows_see_keys_by_position_and_window(module):
    case = Case(40, 90, 4, 2, 64)
    case.q_pos = torch.arange(30, 110, 2)
    case.check(module)
    case.options.update(window=25, kv_pos0=7)
    case.check(module, more=-1.0)
    case.options["key_pos"] = torch.arange(90) * 3  # with holes
    case.check(module, more=-1.0)
    case.options["key_pos"] = torch.arange(90).view(2, 45).flip(0).flatten()  # in no order
    case.check(module, more=-1.0)


def test_a_row_that_sees_nothing_adds_nothing(module):
    case = Case(6, 30, 2, 1, 64)
    case.q_pos[:2] = -5
    case.check(module, more=-3.0)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"q": torch.zeros(3, 4, 64)}, "q: expected bfloat16 or float16"),
        ({"q": torch.zeros(3, 4, 32, dtype=BF16)}, "head size"),
        (
            {"q": torch.zeros(3, 4, 584, dtype=BF16), "k": torch.zeros(40, 2, 584, dtype=BF16)},
            "at most 576",
        ),
        ({"q": torch.zeros(3, 3, 64, dtype=BF16)}, "multiple of k's heads"),
        ({"q": torch.zeros(3, 4, 65, dtype=BF16)[..., 1:]}, "q: rows of 16 bytes"),
        ({"k": torch.zeros(40, 2, 64, dtype=FP16)}, "k: of q's dtype"),
        ({"k": torch.zeros(40, 2, 68, dtype=BF16)[..., :64]}, "rows of 16 bytes"),
        ({"slots": torch.arange(9, dtype=torch.int32)}, "kv_slots"),
        ({"q_pos": torch.arange(4)}, "q_pos"),
        ({"lse": torch.zeros(3, 2)}, "lse"),
        ({"weights": torch.zeros(4)}, "weights"),
    ],
)
def test_launchers_check_what_they_are_given(module, changes, said):
    args = dict(
        q=torch.zeros(3, 4, 64, dtype=BF16),
        k=torch.zeros(40, 2, 64, dtype=BF16),
        slots=torch.arange(9),
        q_pos=torch.arange(9, 12),
        lse=torch.zeros(3, 4),
        weights=torch.zeros(3),
    )
    args.update(changes)
    before = module.launches()
    options = dict(scale=1.0, window=-1, logit_cap=0.0, kv_pos0=0, key_pos=None)
    with pytest.raises(KernelError, match=said):
        cuda.attention_mass(module, *args.values(), **options)
    assert module.launches() == before
