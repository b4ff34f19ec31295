"""The gate while serving: some blended requests are computed exactly again when nothing else runs.

Seams (SGLang 0.5.23): the blended last row's logits are what the model's ``forward`` returns;
``Scheduler.on_idle`` runs in the scheduler's thread when there is no batch, on every
tensor-parallel rank alike. A sample's exact prefill takes free slots (evicting what was used
least recently, within bounds), enters no tree, and runs in pieces; between two pieces the
scheduler's socket is asked, and where a request waits the sample is abandoned and tried again
later. All slots are back before ``on_idle`` goes on, so that SGLang's own idle checks hold.

Ranks stay in step: which requests are sampled follows from their tokens, and rank 0 decides for
all whether a request waits and how far apart the logits are.
"""

from __future__ import annotations

import logging
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from sgl_blend.config import BlendConfig
from sgl_blend.engine.gate.model import SglangModel
from sgl_blend.engine.metrics import Metrics
from sgl_blend.engine.request.state import RequestState
from sgl_blend.errors import BlendError
from sgl_blend.gate.fidelity import Distance, distance
from sgl_blend.gate.model import Ask
from sgl_blend.gate.state import GateState
from sgl_blend.gate.window import LiveWindow

if TYPE_CHECKING:
    from sglang.srt.layers.logits_processor import LogitsProcessorOutput
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.managers.scheduler import Scheduler
    from sglang.srt.mem_cache.radix_cache import TreeNode

logger = logging.getLogger(__name__)

#: samples that wait; their logits lie on the device
QUEUE = 4
#: tokens a piece: what a request that arrives may have to wait for
PIECE = 128
#: times that a sample is begun before it is given up
TRIES = 3
#: a prompt that takes more than this share of the KV pool is no sample
POOL_SHARE = 8
#: prompts remembered, so that one that is sent again and again is one sample
SEEN = 256

_GO, _WAIT, _NEVER = 0.0, 1.0, 2.0


@dataclass
class Sample:
    """One blended request. root: the tree's root when it was served (a flush makes another one:
    weights may have changed since). logits: fp32 [vocab], set by the forward."""

    tokens: list[int]
    ratio: float
    root: TreeNode
    logits: torch.Tensor | None = None
    tries: int = 0


@dataclass(eq=False)
class LiveGate:
    """Picks, collects and compares. ``speaks``: whether this rank writes the log."""

    model: SglangModel
    config: BlendConfig
    gate: GateState
    metrics: Metrics
    window: LiveWindow
    speaks: bool
    waiting: deque[Sample] = field(default_factory=deque)
    _planned: int = 0
    _seen: deque[int] = field(default_factory=lambda: deque(maxlen=SEEN))
    _off: bool = False

    # -- while a batch is planned and run --------------------------------------------------

    def pick(self, req: Req, state: RequestState, end: int, number: int) -> Sample | None:
        """A sample, where this prefill piece completes the prompt of a request that was blended
        as the server is set. number: a hash of the prompt, 56 bits."""
        if (
            self._off
            or not self.gate.on
            or state.probe is not None
            or end != len(req.origin_input_ids)
            or state.exact
            or state.counted
            or state.record is None
            or not state.by_default
            # Its adapter may not be loaded any more when the sample is computed again.
            or req.lora_id is not None
            or number >= self.config.gate_sample * (1 << 56)
            or len(self.waiting) + self._planned >= QUEUE
            or number in self._seen
            or end > self.model.capacity // POOL_SHARE
        ):
            return None
        self._seen.append(number)
        self._planned += 1
        return Sample(list(req.origin_input_ids), state.ratio, self.model.tree.root_node)

    def collect(self, samples: list[tuple[int, Sample]], output: LogitsProcessorOutput) -> None:
        """Take the samples' logits before the sampler changes them in place."""
        for row, sample in samples:
            sample.logits = output.next_token_logits[row].float().clone()
            self.waiting.append(sample)
            self._planned -= 1

    # -- while nothing runs ------------------------------------------------------------------

    def before_idle(self, scheduler: Scheduler) -> None:
        """Before ``Scheduler.on_idle``."""
        if self.waiting and scheduler.is_fully_idle():
            try:
                self._compare_one(scheduler)
            except (BlendError, RuntimeError):
                logger.exception("sgl-blend: live samples of the correctness gate end here")
                self._stop()

    def _compare_one(self, scheduler: Scheduler) -> None:
        sample = self.waiting[0]
        if (
            sample.logits is None
            or not self.gate.on
            or sample.root is not self.model.tree.root_node
        ):
            self._drop("stale")
            return
        if not self.model.has_room(len(sample.tokens)):
            self._drop("no room")
            return
        sample.tries += 1
        ask = Ask(sample.tokens).cut(PIECE)
        ran = self.model.run_unless(ask, lambda: self._disturbed(scheduler))
        if ran is None:
            if sample.tries >= TRIES:
                self._drop("disturbed")
            return
        self.model.release(ran)
        apart = Distance(*self.model.agree(distance(ran.logits, sample.logits)))
        self.waiting.popleft()
        self.metrics.gate_compared("compared")
        decided = self.window.add(apart, sample.ratio)
        measured = self.window.mean()
        if measured is not None:
            self.metrics.gate_sample(measured)
        if decided is None:
            differs = self.window.warning()
            if differs is not None and self.speaks:
                logger.warning("sgl-blend: the correctness gate: %s", differs)
            return
        self.metrics.gate_failure("live")
        self.metrics.gate_state(self.gate)
        if self.speaks:
            level = logging.WARNING if self.gate.on else logging.ERROR
            logger.log(level, "sgl-blend: the correctness gate: %s", decided)

    def _disturbed(self, scheduler: Scheduler) -> bool:
        """Does a request wait? Rank 0's answer."""
        source = scheduler.recv_from_tokenizer
        answer = _GO
        if source is not None:
            if not hasattr(source, "poll"):  # SGLang's Rust frontend cannot be asked
                answer = _NEVER
            elif source.poll(0):
                answer = _WAIT
        [answer] = self.model.agree([answer])
        if answer == _NEVER:
            if self.speaks:
                logger.warning(
                    "sgl-blend: the correctness gate samples no live requests under this frontend"
                )
            self._stop()
        return answer != _GO

    def _drop(self, why: str) -> None:
        if self.waiting:
            self.waiting.popleft()
            self.metrics.gate_compared(why)

    def _stop(self) -> None:
        self._off = True
        self.waiting.clear()
