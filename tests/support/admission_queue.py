"""One waiting queue over SGLang's own ``PrefillAdder``. Needs: CPU, SGLang."""

from __future__ import annotations

from typing import Any

from cache_world import World
from packing import pack
from sglang.srt.managers.schedule_policy import PrefillAdder

from sgl_blend.config import BlendConfig
from sgl_blend.engine.request.admission import admit
from sgl_blend.engine.request.lookup import SourceLookup
from sgl_blend.engine.request.whole import WholePrompts
from sgl_blend.gate.state import GateState

PIECE = 256


class Queue:
    """Packs prefill batches, as ``Scheduler`` does, with our hook or without. whole: prompts longer
    than a piece may be taken whole. most: ``--max-prefill-tokens``. running: the running batch."""

    def __init__(
        self,
        world: World,
        hooked: bool = True,
        apart: bool = False,
        whole: bool = False,
        most: int = 16384,
        loads: Any = None,
        **options: Any,
    ) -> None:
        self.world, self.most, self.running = world, most, None
        config, gate = BlendConfig(tiers=("device",), **options), GateState(0.1)
        lookup = SourceLookup(world.cache, config, gate, 4096, loads)
        prompts = WholePrompts(lookup, config, gate) if whole else None
        hook = admit(config, gate, None, lookup, apart, whole=prompts)
        self.add = hook if hooked else lambda add, adder, req, **kw: add(adder, req, **kw)
        self.adder: PrefillAdder

    def batch(self, reqs: list) -> tuple[list[tuple[str, int, int]], list]:
        """(id, begin, end) of what runs, in order; and the requests that go on waiting."""
        self.adder = PrefillAdder(
            self.world.page,
            self.world.cache,
            self.world.allocator,
            self.running,
            1.0,
            self.most,
            PIECE,
        )
        runs, left = pack(self.world, self.add, reqs, PIECE, self.adder)
        return [(r.rid, r.prefix_len, r.extend_end) for r in runs], left
