"""The class behind ``platform.activate``; imported only once it is chosen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import PlatformCapabilities, SRTPlatform

from sgl_blend.engine import seams
from sgl_blend.engine.forward.latent import has_latents, run_absorbed


class PortableCpuPlatform(CpuDeviceMixin, SRTPlatform):
    """CPU through torch's own operators (``platforms/interface.py``, SGLang 0.5.23)."""

    _enum = PlatformEnum.OOT
    device_name = "cpu"
    device_type = "cpu"
    capabilities = PlatformCapabilities()

    def get_device(self, device_id: int = 0) -> str:
        # SGLang asks for a ``torch.device`` here and then treats it as a text
        # (``arg_groups/serving_hook.py:658``). torch takes the text wherever it takes a device.
        return "cpu"

    def apply_server_args_defaults(self, server_args) -> None:
        from sgl_blend.engine.launch.cpu import choose

        choose(server_args)

    def get_default_attention_backend(self) -> str:
        return "torch_native"

    def get_dispatch_key_name(self) -> str:
        return "native"

    def init_backend(self) -> None:
        from sgl_blend.engine.forward.cpu_attention import install

        seams.install(seams.ROPE_OF_LATENTS, _any_rope, "around")
        install()

    def post_load_model(self, model) -> None:
        # SGLang 0.5.23 has no rule for ``torch_native`` and takes the one for ``triton``: a form of
        # latent attention whose keys are not in the pool, and ``torch_native`` reads no others.
        if has_latents(model):
            run_absorbed("torch_native")

    def is_pin_memory_available(self, device=None) -> bool:
        return False


def _any_rope(
    original: Callable[..., Any],
    head_size: int,
    rotary_dim: int,
    max_position: int,
    base: int,
    is_neox_style: bool = True,
    rope_scaling: dict[str, Any] | None = None,
    *args: Any,
) -> Any:
    """AROUND ``get_rope_cpu`` (SGLang 0.5.23): latent attention asks it for its rope on a CPU, and
    it makes the one with YaRN alone."""
    from sglang.srt.layers.rotary_embedding.factory import get_rope

    given = (head_size, rotary_dim, max_position, base, is_neox_style, rope_scaling)
    return get_rope(*given, *args[:2]) if rope_scaling is None else original(*given, *args)
