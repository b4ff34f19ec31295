"""How long the model's own prefill takes, measured while it runs."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from sgl_blend.tiering.speeds import Speeds

if TYPE_CHECKING:
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch


class ForwardClock:
    """Measures prefill for the loading controller: on a GPU by events, without waiting."""

    def __init__(self, speeds: Speeds, device: torch.device) -> None:
        self._speeds, self._cuda = speeds, device.type == "cuda"
        self._pending: deque[tuple[torch.cuda.Event, torch.cuda.Event, int]] = deque()

    def ordinary(self, forward_batch: ForwardBatch) -> contextlib.AbstractContextManager[None]:
        """A context for the model's own forward: measured where it is one prompt's prefill."""
        prefixes = forward_batch.extend_prefix_lens_cpu
        alone = (
            forward_batch.forward_mode.is_extend() and prefixes is not None and len(prefixes) == 1
        )
        if not alone or any(prefixes):
            return contextlib.nullcontext()
        return self._measured(int(forward_batch.extend_num_tokens))

    @contextlib.contextmanager
    def _measured(self, n_tokens: int) -> Iterator[None]:
        if not self._cuda:
            begun = time.monotonic()
            yield
            self._speeds.observe_prefill(n_tokens, time.monotonic() - begun)
            return
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        yield
        last.record()
        self._pending.append((first, last, n_tokens))
        while self._pending and self._pending[0][1].query():
            first, last, n_tokens = self._pending.popleft()
            self._speeds.observe_prefill(n_tokens, first.elapsed_time(last) / 1e3)
