"""Prefill batches as SGLang's scheduler packs them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cache_world import World
from sglang.srt.managers.schedule_policy import AddReqResult, PrefillAdder


def pack(
    world: World,
    add: Callable[..., Any],
    waiting: list,
    room: int,
    adder: PrefillAdder | None = None,
) -> tuple[list, list]:
    """The batch that is made of ``waiting``, in order, and what goes on waiting. add: is around
    ``PrefillAdder.add_one_req``. room: tokens that a batch takes. adder: in place of an ordinary
    one."""
    cache = world.cache
    if adder is None:
        adder = PrefillAdder(world.page, cache, world.allocator, None, 1.0, 16384, room)
    for req in waiting:
        if adder.budget_state() == AddReqResult.OTHER:
            break
        req.init_next_round_input(cache)
        result = add(
            PrefillAdder.add_one_req,
            adder,
            req,
            has_chunked_req=False,
            truncation_align_size=None,
        )
        if result != AddReqResult.CONTINUE:
            break
    batch = adder.can_run_list
    return batch, [r for r in waiting if not any(r is one for one in batch)]
