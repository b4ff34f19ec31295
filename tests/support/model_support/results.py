"""What SGLang reads from a forward's output for each request, by its own code."""

from __future__ import annotations

from typing import Any

from sglang.srt.managers.schedule_batch import ScheduleBatch
from sglang.srt.managers.scheduler_components.batch_result_processor import (
    SchedulerBatchResultProcessor,
)


def hand_out_hidden_states(batch: ScheduleBatch, output: Any) -> None:
    """After a prefill, into ``req.hidden_states`` of those who ask."""
    reader, at = SchedulerBatchResultProcessor, 0
    mode = reader._get_prefill_hidden_capture_mode(batch)
    for req, rows in zip(batch.reqs, batch.extend_lens, strict=True):
        at = reader._append_prefill_hidden_states(
            None,
            req=req,
            logits_output=output,
            hidden_state_offset=at,
            capture_hidden_mode=mode,
            extend_input_len=rows,
        )
