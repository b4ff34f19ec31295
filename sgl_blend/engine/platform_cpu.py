"""The class behind ``platform.activate``; imported only once it is chosen."""

from __future__ import annotations

from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import PlatformCapabilities, SRTPlatform


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

    def is_pin_memory_available(self, device=None) -> bool:
        return False
