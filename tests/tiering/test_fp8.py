"""Chunks of fp8 through a real store process: their bytes; K is turned on the way. CPU only."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from kernels import FP8, make_rope, same
from tiering_testing import SPACE, TENANT, chunks_of, covered, tokens_of

from sgl_blend import ops
from sgl_blend.config import BlendConfig
from sgl_blend.engine.request.connect_store import check_forms
from sgl_blend.errors import ConfigError
from sgl_blend.store.chunk import Layout
from sgl_blend.tiering.hostkv import HostKV
from sgl_blend.tiering.loader import Load
from sgl_blend.tiering.offload import FreshChunk, Job, Offloader
from sgl_blend.tiering.rules import Allowance, Rules
from sgl_blend.tiering.speeds import Speeds
from sgl_blend.tiering.tally import Tally
from sgl_blend.tiering.wish import Wish

LAYERS = 3
LAYOUT = Layout(LAYERS, 2, 16, 8)


class Pool:
    def __init__(self, dtype: torch.dtype, slots: int, rope: ops.Rope | None) -> None:
        gen = torch.Generator().manual_seed(0)
        parts = [
            [torch.randn(slots, 2, dim, generator=gen).to(dtype) for dim in (16, 8)]
            for _ in range(LAYERS)
        ]
        self._parts, self._rope = parts, rope

    def k(self, layer: int) -> torch.Tensor:
        return self._parts[layer][0]

    def v(self, layer: int) -> torch.Tensor:
        return self._parts[layer][1]

    def moved(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.k(layer), self.v(layer)

    def rope(self, layer: int) -> ops.Rope | None:
        return self._rope


@pytest.mark.parametrize("rope", [None, make_rope(16, True)], ids=["still", "turned"])
@pytest.mark.parametrize("dtype", FP8)
def test_chunks_come_back_as_the_pool_would_copy_them(client, dtype, rope):
    name, n = str(dtype).removeprefix("torch."), 300
    pool = Pool(dtype, 1000, rope)
    tokens = tokens_of(21, n)
    fresh = [FreshChunk(c, 0) for c in chunks_of(tokens)]
    offloader = Offloader(pool, LAYOUT, name, Tally())
    offloader.run(client, Job(SPACE, tokens, torch.arange(n), fresh, lambda: True))
    assert offloader.tally.chunks["stored"] > 3

    prompt = np.concatenate([tokens_of(22, 40), tokens])
    wish = Wish(prompt, chunks_of(prompt), len(prompt), 10, TENANT, SPACE, False, 0.1)

    def load(dtype: str) -> Load:
        rules = Rules(LAYOUT, dtype, 10.0, False, 4, 99999, Allowance())
        one = Load(wish, rules, Speeds(LAYERS, True), Tally())
        one.run(client)
        return one

    other = "float8_e5m2" if dtype is torch.float8_e4m3fn else "float8_e4m3fn"
    assert load(other).spans() == [], "a pool of another dtype takes the bytes for its own"
    one = load(name)
    assert covered(one.spans()) > 200
    span = one.spans()[0]
    source = torch.arange(span.source_start, span.source_start + span.length)
    at = torch.arange(span.start, span.end)
    slots, inside = (torch.arange(b, b + span.length) for b in (640, 310))
    kv = HostKV(one, list(span.parts), source, at, slots)
    for layer in range(LAYERS):
        k, v = pool.moved(layer)
        kv.run(pool, layer)
        if rope is None:
            want = k[source], v[source]
        else:
            turn = rope.delta(source, at)
            ops.rotate_copy(k, v, source, inside, *turn, 16, True)
            want = k[inside], v[inside]
        assert same(k[slots], want[0]) and same(v[slots], want[1])
        assert same(kv.values(pool, layer), v[source])
    one.close()


@pytest.mark.parametrize("option", ["disk_serde", "remote_serde"])
@pytest.mark.parametrize("form", ["int8", "fp8"])
def test_forms_that_save_nothing_over_fp8_end_the_launch(tmp_path, option, form):
    file = tmp_path / "store.yaml"
    file.write_text(f"{option}: {form}\nremote: hicache\nremote_options: {{backend: file}}\n")
    disk = str(tmp_path / "disk")
    config = BlendConfig(store_config=str(file), store_disk_path=disk)
    with pytest.raises(ConfigError, match=f"{option} is {form}: .* one byte a value") as error:
        check_forms(config, "float8_e4m3fn")
    assert "Use raw or cachegen" in str(error.value) and "\n" not in str(error.value)
    check_forms(config, "bfloat16")
    file.write_text(f"{option}: cachegen\n")
    check_forms(config, "float8_e4m3fn")
