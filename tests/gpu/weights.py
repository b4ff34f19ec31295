"""A SGLang plugin: random weights with which a Llama reads its context.

SGLang's own random weights (``--load-format dummy``) are of one size, norms included: what a layer
adds vanishes beside the embedding, and an answer depends on the last token alone. Here norms are
one, and queries and keys are large enough for few keys to get most of the attention. Seam (SGLang
0.5.23): what ``DummyModelLoader.load_model`` returns.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

PACKAGE = "sgl_blend_test_weights"
#: of projections' elements; of queries' and keys'
DEVIATION, SHARP = 0.02, 0.03


def install(folder: Path) -> dict[str, str]:
    """Write it as a distribution; returns the environment that makes a server load it."""
    import plugin_distribution  # not beside the copy that a server loads

    return plugin_distribution.install(folder, __file__, PACKAGE)


def register() -> None:
    """Called by SGLang in each of its processes."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    target = "sglang.srt.model_loader.loader.DummyModelLoader.load_model"
    HookRegistry.register(target, after_load, HookType.AFTER)


def after_load(model: Any, *args: Any, **kw: Any) -> None:
    """AFTER ``load_model``, in the scheduler."""
    import torch

    parameters = dict(model.named_parameters())
    generator = torch.Generator(next(iter(parameters.values())).device).manual_seed(0)
    with torch.no_grad():
        for name, values in sorted(parameters.items()):
            if "norm" in name:
                values.fill_(1.0)
            elif "embed" in name:
                values.normal_(0.0, 1.0, generator=generator)
            elif "qkv" in name:
                values.normal_(0.0, SHARP, generator=generator)
                heads = model.config.num_key_value_heads * model.config.head_dim
                values[-heads:].mul_(DEVIATION / SHARP)  # V
            else:
                values.normal_(0.0, DEVIATION, generator=generator)
