"""The compute primitives of the blend prefill. Knows tensors; no SGLang, no plans, no policies.

====================  =========================================================
``batch.py``          attention of the rows of several requests in one launch, on CUDA
``attention.py``      attention of gapped rows by true position; attention mass
``mass.py``           attention mass alone, where the softmax's log-sum-exp is known
``outward.py``        share of attention that leaves the row's document
``deviation.py``      squared distance of cached from fresh KV, per token
``rotation.py``       copies of KV, K rotated to new positions
``parts.py``          ``Parts``: KV outside the pool, wherever it lies
``gather.py``         KV of whole chunks out of the pool
``ropes.py``          ``Rope``, ``FrequencyRope``: rotations between positions
``deltas.py``         difference of fresh from cached KV, K at one position; its means
``rows.py``           scores to row indices
``cuda_build.py``     finds nvcc, compiles ``csrc/cuda`` for a device and compares it with torch
``cuda_check.py``     that comparison
``cuda_rows.py``      face of the CUDA kernels of row attention
``cuda.py``           faces of the other ones: what they serve, their arguments
``checks.py``         what launchers check; the kernels check values (slots, order) themselves
``build.py``          finds and compiles ``csrc/`` at first use
``upload.py``         what the host has made, to a device without waiting
``download.py``       the other way
``reference.py``      the same functions in plain torch
====================  =========================================================

Imports run downward in this table (``attention.py`` may import ``build.py``, never the other
way round). Dispatch is by ``tensor.device``: CPU tensors go to the C++ kernels, CUDA tensors to the
kernels of ``csrc/cuda`` (docs/cuda.md), and either to the torch reference where a kernel does not
serve a shape, where no compiler is installed, or on other devices.

A KV pool is, per layer, ``k_cache [num_slots, Hk, D]`` and ``v_cache [num_slots, Hk, Dv]`` in
float32, bfloat16, float16 or fp8 (e4m3fn, e5m2). fp8 holds values over a scale of the layer's,
which no kernel knows: rotations and comparisons are the same in any unit, and whoever calls
attention multiplies its ``scale`` by K's and its output by V's. Bad arguments raise
``KernelError``.
"""

from sgl_blend.ops.attention import (
    AttentionWithMass,
    row_attention,
    row_attention_with_mass,
)
from sgl_blend.ops.batch import Asking, RowBatch, ScratchBatch, near
from sgl_blend.ops.cuda import Chosen
from sgl_blend.ops.cuda_rows import Attended, one_buffer
from sgl_blend.ops.deltas import At, Averaged, averages, kv_deltas, mean_deltas
from sgl_blend.ops.deviation import kv_deviation, v_deviation
from sgl_blend.ops.download import Download
from sgl_blend.ops.gather import gather_chunks
from sgl_blend.ops.mass import MassSum, Window, attention_mass
from sgl_blend.ops.outward import outward_share
from sgl_blend.ops.parts import Parts
from sgl_blend.ops.reference import Bias, biased, cast, put, rotate
from sgl_blend.ops.ropes import AnyRope, FrequencyRope, Rope, Rotation, Turns
from sgl_blend.ops.rotation import reads, rotate_copy, rotate_from
from sgl_blend.ops.rows import covering_rows, select_rows, top_rows
from sgl_blend.ops.upload import page_locked, upload, upload_together

__all__ = [
    "AnyRope",
    "Asking",
    "At",
    "Attended",
    "AttentionWithMass",
    "Averaged",
    "Bias",
    "Chosen",
    "Download",
    "FrequencyRope",
    "MassSum",
    "Parts",
    "Rope",
    "RowBatch",
    "Rotation",
    "ScratchBatch",
    "Turns",
    "Window",
    "attention_mass",
    "averages",
    "biased",
    "cast",
    "covering_rows",
    "gather_chunks",
    "kv_deltas",
    "kv_deviation",
    "mean_deltas",
    "near",
    "one_buffer",
    "outward_share",
    "page_locked",
    "put",
    "reads",
    "rotate",
    "rotate_copy",
    "rotate_from",
    "row_attention",
    "row_attention_with_mass",
    "select_rows",
    "top_rows",
    "upload",
    "upload_together",
    "v_deviation",
]
