"""A chunk: header, layout, identity. Pure."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from store_testing import digest, make_chunk

from sgl_blend.store.chunk import BodyView, Layout, make_namespace
from sgl_blend.store.errors import ProtocolError


def test_body_is_layer_major_and_ranges_are_contiguous():
    header, body = make_chunk(1, layout=Layout(3, 2, 8, 4), n_tokens=5)
    view = BodyView(header, body)
    assert header.tokens_bytes == 64
    assert header.body_bytes == 64 + 3 * (5 * 2 * 8 + 5 * 2 * 4) * 2
    flat = body[64:].view(np.float16)
    k1, v1 = view.layer(1)
    per_layer = 5 * 2 * 12
    np.testing.assert_array_equal(k1.ravel(), flat[per_layer : per_layer + 80])
    np.testing.assert_array_equal(v1.ravel(), flat[per_layer + 80 : 2 * per_layer])
    begin, end = header.layer_range(1, 3)
    part = BodyView(header, body[begin:end], (1, 3))
    np.testing.assert_array_equal(part.layer(2)[1], view.layer(2)[1])
    assert np.shares_memory(part.layer(2)[0], body)
    with pytest.raises(ProtocolError, match="layer 0"):
        part.layer(0)
    with pytest.raises(ProtocolError, match="token ids"):
        _ = part.token_ids


def test_torch_views_share_memory_and_carry_the_dtype():
    header, body = make_chunk(2, dtype="bfloat16")
    k, v = BodyView(header, body).torch_layer(2)
    assert k.dtype == torch.bfloat16 and k.shape == (32, 2, 16)
    k[0, 0, 0] = 1.5
    assert BodyView(header, body).torch_layer(2)[0][0, 0, 0] == 1.5


def test_mla_layout_has_no_v():
    header, body = make_chunk(3, layout=Layout(2, 1, 576, 0), n_tokens=3)
    k, v = BodyView(header, body).layer(1)
    assert k.shape == (3, 1, 576) and v.shape == (3, 1, 0)


def test_namespace_parts_do_not_run_together():
    assert make_namespace("ab", "c") != make_namespace("a", "bc")
    assert make_namespace("1") != make_namespace(1)
    assert make_namespace("m", 0, "salt") == make_namespace("m", 0, "salt")


def test_chunk_id_tells_copies_apart():
    base, _ = make_chunk(4)
    ids = {
        base.chunk_id,
        make_chunk(4, context=digest("c"))[0].chunk_id,
        make_chunk(4, generation=1)[0].chunk_id,
        make_chunk(4, namespace=make_namespace("other"))[0].chunk_id,
        make_chunk(5)[0].chunk_id,
    }
    assert len(ids) == 5
