"""``sgl-blend size`` against the pool that SGLang has made of the same model."""

from __future__ import annotations

from typing import Any

from model_support.world import World, check
from sgl_blend.cli.kv_size import kv_size, read_config


@check
def size_is_the_pools(world: World) -> dict[str, Any]:
    """A token's bytes, computed from ``config.json`` alone, are those of SGLang's buffers."""
    runner = world.engine.runner
    pool = world.engine.pool
    kinds = {"torch.float8_e4m3fn": "fp8_e4m3", "torch.float8_e5m2": "fp8_e5m2"}
    dtype = kinds.get(str(pool.dtype), str(pool.dtype).removeprefix("torch."))
    size = kv_size(read_config(str(runner.model_config.model_path)), dtype)
    layers = range(world.engine.layers)
    if size.kind == "MLA":
        rows = [pool.get_key_buffer(layer) for layer in layers]
    else:
        rows = [b(i) for b in (pool.get_key_buffer, pool.get_value_buffer) for i in layers]
    held = sum(r[0].numel() * r.element_size() for r in rows)
    assert size.rank_bytes() == held, (size, held)
    assert size.layers == world.engine.layers
    assert size.kv_heads == rows[0].shape[1], (size, rows[0].shape)
    return {"bytes": held, "kind": size.kind}
