"""A model's attention layers and rotary modules, and what in them blending cannot serve.

``gate/rotation.py`` measures what a single key shows. What it cannot show (masks, temperatures,
tables that change while serving) stands in attributes of ``RadixAttention`` and in the class of the
rotary module (SGLang 0.5.23): what is not known here is refused, with its layer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from sgl_blend.errors import KernelError, UnsupportedError
from sgl_blend.gate.rotation import Candidate
from sgl_blend.ops import AnyRope, FrequencyRope, Rope

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention

#: Rotary classes (``layers/rotary_embedding/``, 0.5.23) that are no fixed rotation per position, or
#: are not meant to be.
VARYING_ROPES = {
    "DynamicNTKScalingRotaryEmbedding": "its frequencies are meant to follow the prompt's length",
    "Phi3LongRoPEScaledRotaryEmbedding": "its table is switched with the prompt's length",
    "DualChunkRotaryEmbedding": "queries are encoded five times, by chunks of the prompt",
    "FourierRotaryEmbedding": "each head mixes frequencies of its own",
}


def _none(value: Any) -> bool:
    return value is None


def _off(value: Any) -> bool:
    return not value


#: attributes of ``RadixAttention`` (0.5.23) all of whose values ``AttentionSpec`` and the KV pool
#: say, and one of transformers
ANY = frozenset(
    """
    tp_q_head_num tp_k_head_num tp_v_head_num head_dim qk_head_dim v_head_dim scaling layer_id
    sliding_window_size use_prefill_attention_wrapper logit_cap k_scale v_scale k_scale_float
    v_scale_float quant_method _is_hf_initialized
    """.split()
)
#: others that are served where the value is; one that is not named may be None
KNOWN: Mapping[str, Callable[[Any], bool]] = {
    "logit_capping_method": lambda value: value == "tanh",
    "is_cross_attention": _off,
    "use_irope": _off,
    "attn_type": lambda value: getattr(value, "value", value) == "decoder",
    "pos_encoding_mode": lambda value: value == "NONE",
    "xai_temperature_len": lambda value: value is None or value <= 0,
}

_OF_ANY_MODULE = frozenset(vars(torch.nn.Module()))


def check_attributes(attn: RadixAttention) -> None:
    """Raise :class:`UnsupportedError`, whose message begins with the layer, where the attention has
    an attribute that blending does not know, or one with a value that it does not serve."""
    values = {k: v for k, v in vars(attn).items() if k not in _OF_ANY_MODULE}
    for held in (attn._parameters, attn._buffers, attn._modules):
        values.update(held)
    for name, value in values.items():
        if name not in ANY and not KNOWN.get(name, _none)(value):
            shown = "" if isinstance(value, torch.nn.Module | torch.Tensor) else f" = {value}"
            raise UnsupportedError(
                f"layer {attn.layer_id}: its attention has {name}{shown}, which blending does not "
                "serve"
            )


@dataclass(frozen=True)
class ModelLayers:
    """candidates: the model's rotary modules. own: layer -> the candidate beside its attention."""

    candidates: list[Candidate]
    own: dict[int, int]

    def positions(self, context: int) -> int:
        """How many the model serves, as far as tables tell. context: the server's limit."""
        tables = [self.candidates[i].rope.max_positions for i in self.own.values()]
        if not tables:
            tables = [max((c.rope.max_positions for c in self.candidates), default=context)]
        return min(context, *tables)


def model_layers(model: torch.nn.Module, context: int, dtype: torch.dtype) -> ModelLayers:
    """Look through the modules. context: positions that the server serves. dtype: the model's.

    Raises :class:`UnsupportedError` for a layer whose positions are encoded in a way that no
    measurement shows to be fixed.
    """
    from sglang.srt.layers.radix_attention import RadixAttention

    candidates: list[Candidate] = []
    at: dict[int, int] = {}
    own: dict[int, int] = {}
    for name, module in model.named_modules():
        for rope in _ropes(module, context, dtype):
            at.setdefault(id(module), len(candidates))
            candidates.append(Candidate(f"{type(module).__name__} ({name})", rope))
        attentions = [m for m in module.children() if isinstance(m, RadixAttention)]
        if not attentions:
            continue
        layer = attentions[0].layer_id
        rotary = getattr(module, "rotary_emb", None)
        why = VARYING_ROPES.get(type(rotary).__name__)
        if why is not None:
            raise UnsupportedError(
                f"layer {layer}: cannot move keys encoded by {type(rotary).__name__}: {why}"
            )
        if getattr(module, "alibi_slopes", None) is not None:
            raise UnsupportedError(f"layer {layer}: positions are biases of attention (ALiBi)")
        if rotary is not None:
            own.setdefault(layer, id(rotary))
    return ModelLayers(candidates, {k: at[v] for k, v in own.items() if v in at})


def _ropes(module: Any, context: int, dtype: torch.dtype) -> list[AnyRope]:
    """The rotations that ``module`` may apply; those of vision towers among them."""
    if type(module).__name__ in VARYING_ROPES:
        return []
    if hasattr(module, "cos_sin_cache"):
        with contextlib.suppress(KernelError):
            return [Rope.from_module(module)]
    inv_freq = getattr(module, "inv_freq", None)
    if isinstance(inv_freq, torch.Tensor) and inv_freq.dim() == 1 and inv_freq.numel():
        # Which dimensions are turned together stands in the attention's code.
        return [FrequencyRope(inv_freq.float(), pairs, dtype, context) for pairs in (True, False)]
    return []
