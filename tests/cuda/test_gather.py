"""The kernels that copy tokens as they are, through the emulator: the pool's into chunk bodies, and
parts' of the host into one layer. Byte for byte; what lies around is compared, too. CPU."""

from __future__ import annotations

import emulated
import numpy as np
import pytest
import torch
from kernels import POOL_DTYPES, same

from sgl_blend import ops
from sgl_blend.errors import KernelError
from sgl_blend.ops import cuda, gather
from sgl_blend.store.chunk import NO_CONTEXT, BodyView, ChunkHeader, Layout

CPU = torch.device("cpu")
LAYERS, SLOTS = 3, 90


@pytest.fixture(scope="module")
def module():
    return emulated.kernels()


def pool(heads, dim, v_dim, dtype, joint=False):
    """K and V of each layer; joint: in one buffer a layer, as a latent cache's parts are."""
    gen = torch.Generator().manual_seed(dim)

    def make(width):
        return (torch.randn(SLOTS, heads, width, generator=gen) * 3).to(dtype)

    if joint:
        both = [make(v_dim + dim) for _ in range(LAYERS)]
        return [x[..., v_dim:] for x in both], [x[..., :v_dim] for x in both]
    return tuple([make(width) for _ in range(LAYERS)] for width in (dim, v_dim))


def bodies(ks, vs, slots, chunks) -> torch.Tensor:
    """As the store reads and writes them (``BodyView``)."""
    heads, dim, v_dim = *ks[0].shape[1:], vs[0].shape[2]
    name = str(ks[0].dtype).removeprefix("torch.")
    out = []
    for first, last in chunks:
        header = ChunkHeader(
            namespace=NO_CONTEXT, key=NO_CONTEXT, layout=Layout(len(ks), heads, dim, v_dim),
            dtype=name, n_tokens=last - first,
        )  # fmt: skip
        body = BodyView(header, np.zeros(header.body_bytes, dtype=np.uint8))
        for layer, pair in enumerate(zip(ks, vs, strict=True)):
            for to, cache in zip(body.torch_layer(layer), pair, strict=True):
                to.copy_(cache[slots[first:last]])
        out.append(body.torch_values())
    return torch.cat(out)


def gathered(run, want):
    """What ``run`` writes, between 16 bytes of poison before and behind it."""
    room = torch.full((len(want) + 48,), 0xA5, dtype=torch.uint8)
    begin = -room.data_ptr() % 16 + 16
    run(room[begin : begin + len(want)])
    around = torch.cat((room[:begin], room[begin + len(want) :]))
    return room[begin : begin + len(want)], bool((around == 0xA5).all())


CHUNKS = [(2, 9), (9, 10), (17, 46), (60, 76)]


@pytest.mark.parametrize("dtype", POOL_DTYPES)
def test_chunks_are_gathered_in_one_launch(module, dtype):
    ks, vs = pool(2, 48, 16, dtype)
    slots = torch.randperm(SLOTS, generator=torch.Generator().manual_seed(1))
    want = bodies(ks, vs, slots, CHUNKS)
    for way in emulated.schedules(module):
        before = module.launches()
        got, clean = gathered(
            lambda out: cuda.gather_chunks(module, ks, vs, slots, CHUNKS, out), want
        )
        assert torch.equal(got, want) and clean, way
        assert module.launches() == before + 1


@pytest.mark.parametrize(
    ("heads", "dim", "v_dim", "joint"),
    [
        (1, 16, 8, False),  # three words a token: fewer than threads
        (8, 128, 128, False),  # more than all threads have in flight at once
        (1, 64, 512, True),  # a latent cache's parts
        (3, 40, 24, False),
        (1, 72, 56, True),
    ],
)
def test_shapes(module, heads, dim, v_dim, joint):
    ks, vs = pool(heads, dim, v_dim, torch.bfloat16, joint)
    slots, chunks = torch.arange(SLOTS).flip(0), [(0, 21), (30, 33)]
    want = bodies(ks, vs, slots, chunks)
    got, clean = gathered(lambda out: cuda.gather_chunks(module, ks, vs, slots, chunks, out), want)
    assert cuda.gathers(ks, vs, got)
    assert torch.equal(got, want) and clean


@pytest.mark.parametrize("kernel", [True, False], ids=["kernel", "torch"])
@pytest.mark.parametrize("dtype", POOL_DTYPES)
def test_the_op_and_its_reference_agree(module, monkeypatch, dtype, kernel):
    monkeypatch.setattr(gather, "kernels", lambda device, *_: module if kernel else None)
    for dim in (32, 6):  # the second fills no 16 bytes: torch's, whatever there is
        ks, vs = pool(2, dim, dim, dtype)
        for caches in (ks, vs):
            caches[1] = torch.cat((caches[1], caches[1][:3]))  # a layer may have slots more
        slots = torch.randperm(SLOTS, generator=torch.Generator().manual_seed(2)).int()
        want, before = bodies(ks, vs, slots, CHUNKS), module.launches()
        out = torch.empty(len(want), dtype=torch.uint8)
        ops.gather_chunks(ks, vs, slots, CHUNKS, out)
        assert torch.equal(out, want)
        assert module.launches() == before + (kernel and dim == 32)


def parts_of(k, v, cuts, dtype):
    """[layers, n_i, heads, dim] each, of larger buffers, so that steps differ."""
    layers = [torch.stack([x + i for i in range(LAYERS)]).to(dtype) for x in (k, v)]
    return tuple(
        [torch.cat((x[:, a:b], x[:, :i]), 1)[:, : b - a] for i, (a, b) in enumerate(cuts)]
        for x in layers
    )


CUTS = [(0, 7), (7, 7), (7, 8), (8, 41), (41, 53)]


@pytest.mark.parametrize("index", [None, torch.tensor([50, 3, 3, 7, 6, 52, 0, 8, 9])])
@pytest.mark.parametrize("dtype", POOL_DTYPES)
def test_tokens_are_taken_from_where_they_lie(module, dtype, index):
    gen = torch.Generator().manual_seed(3)
    k, v = torch.randn(53, 2, 48, generator=gen), torch.randn(53, 2, 16, generator=gen)
    ks, vs = parts_of(k, v, CUTS, dtype)
    places = cuda.places_of(ks, vs, CPU)
    want_k, want_v = (torch.cat([part[2] for part in parts]) for parts in (ks, vs))
    if index is not None:
        want_k, want_v = want_k[index], want_v[index]
    for way in emulated.schedules(module):
        for blocks in (0, 1):  # two, and fewer than there is work for
            room_k, room_v = (torch.full_like(torch.cat((x, x[:1])), 7) for x in (want_k, want_v))
            cuda.take_from(module, places, 2, blocks, room_k[:-1], room_v[:-1], index)
            assert same(room_k[:-1], want_k) and same(room_v[:-1], want_v), way
            assert bool((room_k[-1].float() == 7).all() and (room_v[-1].float() == 7).all()), way
        only = torch.full_like(want_v, 7)
        cuda.take_from(module, places, 2, 0, None, only, index)
        assert same(only, want_v), way


def test_parts_of_other_layouts_have_no_places():
    k = torch.zeros(LAYERS, 5, 2, 16, dtype=torch.bfloat16)
    assert cuda.places_of([k], [k], CPU) is not None
    for bad in (k[..., :12], k.transpose(1, 2), torch.zeros(LAYERS * 5 * 32 + 1)[1:]):
        bad = bad.to(torch.bfloat16) if bad.dim() > 1 else bad.view(LAYERS, 5, 2, 16)
        assert cuda.places_of([bad], [k.to(bad.dtype)], CPU) is None


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"v_caches": []}, "layers of K"),
        ({"k_caches": "narrow"}, "not like the first layer's"),
        ({"k_caches": "strided"}, r"k_caches\[2\] has stride"),
        ({"slots": torch.zeros(3, 2).long()}, "slots"),
        ({"slots": torch.tensor([0, 1, SLOTS, 3])}, "slots spans"),
        ({"chunks": [(0, 2), (3, 3)]}, r"a chunk is \[3, 3\)"),
        ({"chunks": [(0, 2), (2, 5)]}, r"a chunk is \[2, 5\)"),
        ({"out": torch.zeros(100, dtype=torch.uint8)}, "out is"),
        ({"out": torch.zeros(4 * LAYERS * 128)}, "out is"),
    ],
)
def test_the_op_checks_what_it_is_given(changes, said):
    ks, vs = pool(2, 16, 16, torch.bfloat16)
    if "k_caches" in changes:
        narrow = changes["k_caches"] == "narrow"
        changes = {"k_caches": [*ks[:2], ks[2][..., :8] if narrow else ks[2][..., ::2]]}
    args = dict(
        k_caches=ks,
        v_caches=vs,
        slots=torch.arange(4),
        chunks=[(0, 2), (2, 4)],
        out=torch.zeros(4 * LAYERS * 128, dtype=torch.uint8),
    )
    with pytest.raises(KernelError, match=said):
        ops.gather_chunks(**{**args, **changes})


def test_launchers_check_what_they_are_given(module):
    ks, vs = pool(2, 16, 16, torch.bfloat16)
    slots, before = torch.arange(4), module.launches()
    room = torch.zeros(4 * LAYERS * 128 + 16, dtype=torch.uint8)
    begin = -room.data_ptr() % 16
    for out, said in ((room[begin + 1 : -15], "out"), (room.int(), "out")):
        with pytest.raises(KernelError, match=said):
            cuda.gather_chunks(module, ks, vs, slots, [(0, 4)], out)
    with pytest.raises(KernelError, match="slots"):
        cuda.gather_chunks(module, ks, vs, slots.int(), [(0, 4)], room[begin:-16])
    with pytest.raises(KernelError, match="rows of 16 bytes"):
        narrow = [x[..., :3] for x in ks]
        cuda.gather_chunks(module, narrow, vs, slots, [(0, 4)], room[begin:-16])
    k, v = (torch.zeros(4, 2, 16, dtype=torch.bfloat16) for _ in "kv")
    places = cuda.places_of([k[None]], [v[None]], CPU)
    with pytest.raises(KernelError, match="as many as there are places"):
        cuda.take_from(module, places, 0, 0, k[:3], v[:3])
    with pytest.raises(KernelError, match="layer"):
        cuda.take_from(module, places, -1, 0, k, v)
    with pytest.raises(KernelError, match="index"):
        cuda.take_from(module, places, 0, 0, k[:3], v[:3], torch.zeros(2).long())
    assert module.launches() == before
