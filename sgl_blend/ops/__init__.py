"""The compute primitives of the blend prefill. Knows tensors; no SGLang, no plans, no policies.

====================  =========================================================
``rotation.py``       copies of KV, K rotated to new positions
``attention.py``      attention of gapped rows by true position; attention mass
``outward.py``        share of attention that leaves the row's document
``deviation.py``      squared distance of cached from fresh V, per token
``ropes.py``          ``Rope``, ``FrequencyRope``: rotations between positions
``rows.py``           scores to row indices
``checks.py``         what launchers check; the kernels check values (slots, order) themselves
``build.py``          finds and compiles ``csrc/`` at first use
``reference.py``      the same functions in plain torch
====================  =========================================================

Imports run downward in this table (``attention.py`` may import ``build.py``, never the other
way round). Dispatch is by ``tensor.device``: CPU tensors go to the C++ kernels, or to the torch
reference where no compiler is installed; all other devices go to the reference.

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
from sgl_blend.ops.deviation import v_deviation
from sgl_blend.ops.outward import outward_share
from sgl_blend.ops.reference import Bias, biased, cast, put, rotate
from sgl_blend.ops.ropes import AnyRope, FrequencyRope, Rope, Rotation, Turns
from sgl_blend.ops.rotation import Parts, rotate_copy, rotate_from
from sgl_blend.ops.rows import covering_rows, top_rows

__all__ = [
    "AnyRope",
    "AttentionWithMass",
    "Bias",
    "FrequencyRope",
    "Parts",
    "Rope",
    "Rotation",
    "Turns",
    "biased",
    "cast",
    "covering_rows",
    "outward_share",
    "put",
    "rotate",
    "rotate_copy",
    "rotate_from",
    "row_attention",
    "row_attention_with_mass",
    "top_rows",
    "v_deviation",
]
