"""sgl-blend: non-prefix KV-cache reuse for SGLang.

Imports run downward only (``.ci/imports.py`` checks it). From the top floor to the bottom:

======================  =======================================================
``cli/``                commands
``bench/ eval/``        benchmarks, the demo, fidelity tables; over HTTP
``harness/``            starts real servers and talks to them
``engine/``             the plugin: everything that hooks into SGLang
``gate/``               the correctness gate: is blended KV what it claims to be, here?
``tree/``               SGLang's radix tree with content-hash chunks
``prefill/``            the blend prefill: row sets through the model's own layers
``tiering/``            chunks between the KV pool and a chunk store: load, offload, decide
``selection/``          one file a policy: which reused tokens are recomputed
``store/``              chunk store (CPU, disk, distributed)
``ops/``                kernels' Python faces, each beside its torch reference
``plan.py``             a prompt as spans: the data that all of the above pass on
``chunking.py``         token ids to content-hash chunks
``config.py``           one frozen configuration
``lang.py``             prompts of parts, whose boundaries a server is told (for programs)
``attach.py``           the attributes that are put on SGLang's objects
``errors.py``           one family of errors
======================  =======================================================

Importing this package imports nothing heavy (no torch, no sglang, no zmq).
"""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "Engine":
        from sgl_blend.engine.launch.offline import Engine

        return Engine
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
