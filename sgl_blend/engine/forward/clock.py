"""How long the model's own prefill takes, measured while it runs."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch

    from sgl_blend.tiering.speeds import Speeds

#: batches that the pace is taken from, and the fewest tokens of one: small ones take as long as
#: larger ones
BATCHES, LEAST = 64, 32


class ForwardClock:
    """Measures prefill for the loading controller and for the estimate of what blending saves: on
    a GPU by events, without waiting. speeds: the controller's; None: it has none."""

    def __init__(self, device: torch.device, speeds: Speeds | None = None) -> None:
        self._speeds, self._cuda = speeds, device.type == "cuda"
        self._pending: deque[tuple[torch.cuda.Event, torch.cuda.Event, int, bool]] = deque()
        #: (seconds per token, tokens) of the latest batches
        self._seen: deque[tuple[float, int]] = deque(maxlen=BATCHES)

    def pace(self) -> float | None:
        """Seconds that a token of ordinary prefill takes: half of the tokens measured last took no
        more. None before the first."""
        measured = sorted(self._seen)
        half = sum(n for _, n in measured) / 2
        for pace, n in measured:
            half -= n
            if half <= 0:
                return pace
        return None

    def ordinary(self, forward_batch: ForwardBatch) -> contextlib.AbstractContextManager[None]:
        """A context for the model's own forward: measured where it is a prefill; for the
        controller, where it is one whole prompt's."""
        prefixes = forward_batch.extend_prefix_lens_cpu
        if not forward_batch.forward_mode.is_extend() or prefixes is None:
            return contextlib.nullcontext()
        whole = len(prefixes) == 1 and not any(prefixes)
        n_tokens = int(forward_batch.extend_num_tokens)
        if not whole and n_tokens < LEAST:
            return contextlib.nullcontext()
        return self._measured(n_tokens, whole)

    @contextlib.contextmanager
    def _measured(self, n_tokens: int, whole: bool) -> Iterator[None]:
        if not self._cuda:
            begun = time.monotonic()
            yield
            self._took(n_tokens, time.monotonic() - begun, whole)
            return
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        yield
        last.record()
        self._pending.append((first, last, n_tokens, whole))
        while self._pending and self._pending[0][1].query():
            first, last, n_tokens, whole = self._pending.popleft()
            self._took(n_tokens, first.elapsed_time(last) / 1e3, whole)

    def _took(self, n_tokens: int, seconds: float, whole: bool) -> None:
        if whole and self._speeds is not None:
            self._speeds.observe_prefill(n_tokens, seconds)
        if n_tokens >= LEAST:
            self._seen.append((seconds / n_tokens, n_tokens))
