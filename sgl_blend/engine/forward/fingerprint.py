"""Model fingerprint: KV of one model, dtype, layout or rope must never serve another."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any


def model_fingerprint(model_runner: Any, model_config: Any) -> str:
    """Digest over weights identity, dtype, KV layout and rope parameters.

    Weights are identified by the names, sizes and head bytes of the files they were loaded
    from; where there are no local files, by the path and revision.
    """
    h = hashlib.blake2b(digest_size=16)
    hf = model_config.hf_text_config

    def add(*values: Any) -> None:
        h.update(repr(values).encode())

    add("arch", getattr(model_config.hf_config, "architectures", None), hf.to_json_string())
    pool = model_runner.token_to_kv_pool
    add("kv", str(pool.dtype), pool.head_num, pool.head_dim, pool.v_head_dim, pool.layer_num)
    add("weights", *_weights_identity(Path(model_config.model_path)))
    add("revision", str(model_config.revision))
    return h.hexdigest()


def _weights_identity(path: Path) -> list[Any]:
    files = sorted(
        p for p in path.glob("*") if p.suffix in (".safetensors", ".bin", ".pt", ".gguf")
    )
    if not files:
        return [str(path)]
    out: list[Any] = []
    for p in files:
        size = p.stat().st_size
        with p.open("rb") as f:
            head = f.read(1 << 20)
            f.seek(max(0, size - (1 << 20)))
            tail = f.read(1 << 20)
        out.append((p.name, size, hashlib.blake2b(head + tail, digest_size=16).hexdigest()))
    return out
