"""The kernel that moves reused KV, through the emulator, against the torch reference: bit for bit.

Every pool has poison around what is read, and what must not be written is compared, too. CPU.
"""

from __future__ import annotations

import emulated
import pytest
import torch
from kernels import FP8, POOL_DTYPES, make_rope, same

from sgl_blend.errors import KernelError
from sgl_blend.ops import cuda, reference
from sgl_blend.ops.rotation import Rotation

BF16 = torch.bfloat16


@pytest.fixture(scope="module")
def module():
    return emulated.kernels()


class Case:
    """n tokens of a pool [slots, heads, dim] that move; seeded by its shape."""

    def __init__(self, n, heads, dim, v_dim, rotary_dim, neox, dtype, slots=90):
        self.gen = torch.Generator().manual_seed(n + dim)
        self.n, self.rotary_dim, self.neox, self.dtype = n, rotary_dim, neox, dtype
        self.k, self.v = self.random(slots, heads, dim), self.random(slots, heads, v_dim)
        order = torch.randperm(slots, generator=self.gen)
        self.src, self.dst = order[:n].contiguous(), order[n : 2 * n].contiguous()
        old, self.new = torch.randint(0, 4096, (2, n), generator=self.gen)
        self.rope = make_rope(rotary_dim, neox)
        self.turn = self.rope.delta(old, self.new)

    def random(self, *shape):
        return (torch.randn(shape, generator=self.gen) * 3).to(self.dtype)

    def bias(self, groups=3):
        """Three documents and tokens of none, in no order."""
        k, v = (torch.randn(groups, *x.shape[1:], generator=self.gen) for x in (self.k, self.v))
        group = torch.randint(-1, groups, (self.n,), generator=self.gen).int()
        turn = self.rope.delta(torch.zeros_like(self.new), self.new)
        return reference.Bias(k, v, group, *turn)

    def wanted(self, bias=None, runs=None):
        """K and V of the pool after the move, by the reference."""
        k, v = self.k.clone(), self.v.clone()
        moved = torch.ones(self.n, dtype=torch.bool) if runs is None else runs == 0
        src, dst, turn = self.src[moved], self.dst[moved], [x[moved] for x in self.turn]
        if bias is not None:
            bias = reference.Bias(*bias[:2], *(x[moved] for x in bias[2:]))
        reference.rotate_from(
            self.k[src], self.v[src], k, v, dst, *turn, self.rotary_dim, self.neox, bias
        )
        return k, v

    def check(self, run, want, say):
        k, v = self.k.clone(), self.v.clone()
        run(k, v)
        assert same_or_nan(k, want[0]), f"K, {say}"
        assert same(v, want[1]), f"V, {say}"


def same_or_nan(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Bit for bit, but for which NaN it is."""
    nan = b.float().isnan()
    return torch.equal(a.float().isnan(), nan) and torch.equal(a.float()[~nan], b.float()[~nan])


@pytest.mark.parametrize("neox", [True, False], ids=["halves", "pairs"])
@pytest.mark.parametrize("dtype", POOL_DTYPES)
def test_moved_tokens_are_the_references(module, dtype, neox):
    case = Case(37, 2, 96, 64, 64, neox, dtype)
    want = case.wanted()
    for way in emulated.schedules(module):
        case.check(
            lambda k, v: cuda.rotate_copy(
                module, k, v, case.src, case.dst, case.turn, case.rotary_dim, case.neox
            ),
            want,
            way,
        )


@pytest.mark.parametrize(
    ("n", "heads", "dim", "v_dim", "rotary_dim"),
    [
        (1, 1, 16, 8, 16),  # fewer units than threads
        (5, 8, 128, 128, 128),  # more
        (4, 3, 80, 8, 80),
        (33, 1, 64, 512, 64),  # a latent cache's parts
        (6, 2, 256, 256, 64),
    ],
)
def test_shapes(module, n, heads, dim, v_dim, rotary_dim):
    case = Case(n, heads, dim, v_dim, rotary_dim, True, BF16)
    assert cuda.rotates(case.k, case.v, rotary_dim, case.turn, case.bias())
    case.check(
        lambda k, v: cuda.rotate_copy(
            module, k, v, case.src, case.dst, case.turn, rotary_dim, True
        ),
        case.wanted(),
        "",
    )


@pytest.mark.parametrize("neox", [True, False], ids=["halves", "pairs"])
@pytest.mark.parametrize("dtype", POOL_DTYPES)
def test_each_document_has_its_bias(module, dtype, neox):
    case = Case(41, 2, 96, 64, 64, neox, dtype)
    bias = case.bias()
    assert {-1, 0, 1, 2} == set(bias[2].tolist())
    want = case.wanted(bias)
    for way in emulated.schedules(module):
        case.check(
            lambda k, v: cuda.rotate_copy(
                module, k, v, case.src, case.dst, case.turn, 64, neox, bias=bias
            ),
            want,
            way,
        )


@pytest.mark.parametrize("biased", [False, True])
def test_tokens_that_run_keep_what_they_wrote(module, biased):
    case = Case(29, 2, 64, 64, 64, True, BF16)
    bias = case.bias() if biased else None
    runs = (torch.arange(29) % 3 == 1).to(torch.uint8)
    case.check(
        lambda k, v: cuda.rotate_copy(
            module, k, v, case.src, case.dst, case.turn, 64, True, bias=bias, runs=runs
        ),
        case.wanted(bias, runs),
        "",
    )


def test_parts_outside_the_pool_are_read_where_they_lie(module):
    """Chunks of a tier: some tokens each, several layers, any place. The kernel gets addresses."""
    case = Case(30, 2, 64, 32, 64, True, BF16)
    runs = (torch.arange(30) % 4 == 0).to(torch.uint8)
    cuts = (case.src[:7], case.src[7:7], case.src[7:19], case.src[19:])
    # Three layers, of which the third is meant; of a larger buffer, so that steps differ.
    ks = [torch.stack([case.k[c] * 0, case.k[c] * 0, case.k[c]]) for c in cuts]
    vs = [torch.stack([case.v[c] * 0] * 4)[:3] for c in cuts]
    for v, c in zip(vs, cuts, strict=True):
        v[2] = case.v[c]
    places = cuda.places_of(ks, vs, torch.device("cpu"))
    for way in emulated.schedules(module):
        for blocks in (0, 1):  # a block for sixteen tokens each, and fewer than there is work for
            case.check(
                lambda k, v, blocks=blocks: cuda.rotate_from(
                    module, places, 2, blocks, k, v, case.dst, case.turn, 64, True, runs=runs
                ),
                case.wanted(runs=runs),
                f"{way}, {blocks} blocks",
            )


@pytest.mark.parametrize("dtype", FP8)
def test_every_fp8_value_is_turned_as_by_the_reference(module, dtype):
    """All codes, infinities and NaN among them, by lengths that overflow and underflow."""
    codes = torch.arange(256, dtype=torch.uint8)
    pool = torch.stack((codes, codes.roll(101)), 0).reshape(16, 1, 32).repeat(2, 1, 1).view(dtype)
    src, dst = torch.arange(16), torch.arange(16, 32)
    gen = torch.Generator().manual_seed(0)
    angle = torch.rand(16, 16, generator=gen) * 6.2
    length = torch.tensor([1.0, 3.0, 40.0, 2.0**-9])[torch.arange(16) % 4, None]
    turn = Rotation((angle.cos() * length), (angle.sin() * length))
    for neox in (True, False):
        got, v = pool.clone(), pool.clone()
        cuda.rotate_copy(module, got, v, src, dst, turn, 32, neox)
        want = reference.rotate(pool[src], *turn, 32, neox)
        assert same_or_nan(got[dst], want) and same(v[dst], pool[src])
        assert got[dst].float().isnan().any() and (got[dst].float().abs() > 200).any()


def test_pools_in_one_buffer(module):
    """K and V of one layer may be views into one buffer, and a latent cache's halves are."""
    case = Case(9, 1, 64, 128, 64, True, BF16)
    both = torch.cat((case.v, case.k), -1)
    want_k, want_v = case.wanted()
    cuda.rotate_copy(
        module, both[..., 128:], both[..., :128], case.src, case.dst, case.turn, 64, True
    )
    assert same(both, torch.cat((want_v, want_k), -1))


BASE = Case(5, 2, 32, 32, 32, True, BF16)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"k_cache": BASE.k[:, :1]}, "same slots, heads"),
        ({"k_cache": torch.cat((BASE.k, BASE.k), -1)[..., 4:36]}, "rows of 16 bytes"),
        ({"k_cache": torch.zeros(90 * 64 + 1, dtype=BF16)[1:].view(90, 2, 32)}, "rows of 16 bytes"),
        ({"v_cache": BASE.v[..., ::2]}, "rows of 16 bytes"),
        ({"v_cache": BASE.v.half()}, "same slots, heads and dtype"),
        ({"k_cache": BASE.k.char(), "v_cache": BASE.v.char()}, "a pool is float32"),
        ({"src": BASE.src.int()}, "src_slots"),
        ({"src": BASE.src[:4]}, "src_slots"),
        ({"dst": BASE.dst.repeat(2)[::2]}, "dst_slots"),
        ({"turn": Rotation(BASE.turn.cos[:, :8].contiguous(), BASE.turn.sin)}, "cos, sin"),
        ({"turn": Rotation(BASE.turn.cos, BASE.turn.sin.double())}, "cos, sin"),
        ({"rotary_dim": 8}, "rotary_dim"),
        ({"rotary_dim": 64}, "rotary_dim"),
        ({"runs": torch.zeros(5, dtype=torch.int32)}, "runs"),
        ({"bias": (None, *BASE.bias()[1:])}, "a bias has"),
        ({"bias": (BASE.bias()[0][:2], *BASE.bias()[1:])}, "bias of V"),
        ({"bias": (*BASE.bias()[:2], BASE.bias()[2].long(), *BASE.turn)}, "group"),
    ],
)
def test_launchers_check_what_they_are_given(module, changes, said):
    args = dict(
        k_cache=BASE.k,
        v_cache=BASE.v,
        src=BASE.src,
        dst=BASE.dst,
        turn=BASE.turn,
        rotary_dim=32,
        neox=True,
    )
    before = module.launches()
    with pytest.raises(KernelError, match=said):
        cuda.rotate_copy(module, **{**args, **changes})
    assert module.launches() == before


def test_nothing_to_move_launches_nothing(module):
    before, none = module.launches(), torch.empty(0, dtype=torch.int64)
    turn = Rotation(torch.empty(0, 16), torch.empty(0, 16))
    cuda.rotate_copy(module, BASE.k, BASE.v, none, none, turn, 32, True)
    assert module.launches() == before
