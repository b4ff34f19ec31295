"""sgl-blend: non-prefix KV-cache reuse for SGLang.

Imports run downward only. From the top floor to the bottom:

====================  =========================================================
``cli/ bench/ eval/``  what a person runs; talks to a server over HTTP
``engine/``           the only room that knows SGLang's internals
``gate/``             the correctness gate: is blended KV what it claims to be, here?
``radix.py``          ``BlendRadixCache``: exact and approximate KV in SGLang's tree; below it
                      ``chunk_tree.py`` (chunks in the tree), ``matching.py`` (a prompt's spans),
                      ``anchors.py`` (chunk index), ``turns.py`` (a prompt sent again),
                      ``marks.py``, ``integrity.py``
``prefill.py``        the blend prefill: row sets through the model's own layers; ``pieces.py``,
                      what a batch for it is made of
``attention.py``      attention of gapped rows by true token position (on CUDA:
                      ``attention_flashinfer.py``)
``scores.py``         a score for each slot of the KV pool, measured when its token is computed
``selection/``        one file a policy: which reused tokens are recomputed
``tiering/``          chunks between the KV pool and a chunk store: load, offload, decide
``store/``            chunk store (CPU / disk / distributed); knows no SGLang
``plan.py``           a prompt as spans: the data that all of the above pass on
``ops/``              kernels' Python faces, each beside its torch reference
``chunking.py``       token ids to content-hash chunks
``config.py errors.py registry.py``  one frozen config, one family of errors, one registry
====================  =========================================================

Importing this package imports nothing heavy (no torch, no sglang, no zmq).
"""

__version__ = "0.1.0"


def __getattr__(name: str):
    if name == "Engine":
        from sgl_blend.engine.offline import Engine

        return Engine
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
