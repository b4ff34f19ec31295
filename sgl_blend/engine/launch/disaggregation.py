"""Prefill/decode disaggregation: prefill nodes blend, decode nodes must not pass on what they got.

KV is sent from a request's own slots after its forward (``disaggregation/prefill.py``, SGLang
0.5.23), copied and recomputed tokens alike. A decode node computes no prompt: it runs plain SGLang,
with ``--enable-blend`` too. Whatever it keeps of a prompt it would keep as exact, and leave out of
what it asks of the prefill node for a later request. It is therefore refused where it keeps any;
a prefill node notices one that was launched without ``--enable-blend`` by what it leaves out. Until
its first hit it leaves nothing out: its messages (``TransferInfo``, ``KVArgsRegisterInfo`` in
``disaggregation/mooncake/conn.py``) are then those of one that keeps nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from sgl_blend.errors import UnsupportedError
from sgl_blend.gate.state import GateState

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req

logger = logging.getLogger(__name__)

#: what makes a decode node keep the KV that it was sent beyond a request's end
KEEPING = (
    "disaggregation_decode_enable_radix_cache",
    "disaggregation_decode_enable_offload_kvcache",
    "enable_pd_role_switch",
)
DECODE = (
    "a decode node computes no prompts: it runs without blending. Prefill nodes blend; "
    "their reports are in their own answers and metrics, not in those of this node"
)
PREFILL = (
    "this prefill node blends. Give its decode nodes --enable-blend too, which refuses "
    "those that would keep blended KV as exact. meta_info is a decode node's and shows no report"
)


class Agreement(Protocol):
    """Tensor-parallel ranks."""

    def least(self, values: list[int]) -> list[int]:
        """The least of each value over ranks."""


def is_decode_node(arguments: Any) -> bool:
    """Has this server the decode role? ``arguments``: parsed ones or ``ServerArgs``, as they are
    before resolution. Raises :class:`UnsupportedError` where it keeps what it was sent."""
    if getattr(arguments, "disaggregation_mode", None) != "decode":
        return False
    for option in KEEPING:
        if getattr(arguments, option, False):
            flag = "--" + option.replace("_", "-")
            raise UnsupportedError(
                f"--enable-blend cannot be combined with {flag}: this decode node would keep "
                "blended KV as exact. Drop the option; without --enable-blend no prefill node of "
                "this decode node may blend"
            )
    return True


def watch_decode_nodes(
    gate: GateState, ranks: Agreement, decided: Callable[[], None]
) -> Callable[..., None]:
    """AFTER ``PrefillBootstrapQueue.finalize_bootstrap`` (SGLang 0.5.23), which all ranks come to
    for the same requests in the same order. ``decided``: called when blending is turned off.

    What a decode node leaves out of its wish (``disagg_decode_prefix_len``) it has kept from
    earlier requests: blending ends, on all ranks.
    """

    def finalized(done: bool, queue: Any, req: Req, *args: Any, **kw: Any) -> None:
        kept = req.disagg_decode_prefix_len if done else 0
        if ranks.least([-kept]) == [0] or not gate.on:
            return
        gate.turn_off("a decode node keeps the KV of prompts")
        decided()
        logger.error(
            "sgl-blend: blending is off from now on: a decode node keeps the KV of prompts and "
            "would give blended KV to requests that ask for exact. Launch decode nodes without "
            "--disaggregation-decode-enable-radix-cache and restart both"
        )

    return finalized
