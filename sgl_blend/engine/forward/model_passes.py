"""Passes over SGLang's model: its ordinary ``forward`` on a batch of chosen rows.

Seams (SGLang 0.5.23): ``Model.forward(input_ids, positions, forward_batch, ...)`` builds all that
goes by rows from the batch that it is given; ``forward_context(replace(get_forward_context(),
attn_backend=...))``. A pass that is not to run to the model's end is left by an exception in the
attention of its last layer, on all ranks between the same two collectives; the residual stream that
is then unfinished is ``forward_batch.residual_stream`` (``layers/layer_boundary/residual/``). What
SGLang keeps by the batch's rows goes along: embeddings that replace the tokens' own reach the
model's ``forward`` as ``input_embeds``; ``LoRAManager.prepare_lora_batch`` says which rows are
which adapter's; ``LogitsProcessorOutput.hidden_states`` and ``RoutedExpertsCapturer`` are read by
the whole batch's rows afterwards.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.layers.layer_boundary.residual import batch as residual_batch
from sglang.srt.state_capturer.routed_experts import get_global_experts_capturer

from sgl_blend import ops
from sgl_blend.engine.forward.attn_backend import BlendAttnBackend, StopPass, replaced
from sgl_blend.errors import SeamError
from sgl_blend.prefill.rows import RowAttention

if TYPE_CHECKING:
    from sglang.srt.layers.logits_processor import LogitsProcessorOutput
    from sglang.srt.lora.lora_manager import LoRAManager
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch


class ModelPasses:
    """Implements :class:`sgl_blend.prefill.model.Model` over one SGLang model and forward batch.

    The batch given stays whole, for the sampler; rows are taken on copies. Not thread-safe;
    one instance serves one forward.
    """

    def __init__(
        self,
        forward: Callable[..., Any],
        forward_batch: ForwardBatch,
        num_layers: int,
        input_embeds: torch.Tensor | None = None,
        lora: LoRAManager | None = None,
    ) -> None:
        """forward: the model's own, bound. input_embeds [rows, hidden]: in place of the tokens'
        embeddings, for the whole batch. lora: SGLang's ``LoRAManager``, or None where adapters are
        not served."""
        self.whole = forward_batch
        self.num_layers = num_layers
        self.input_embeds = input_embeds
        self.lora = lora
        self.fb: Any = None
        self._forward = forward

    def run(
        self,
        rows: torch.Tensor | None,
        counts: list[int],
        attention: RowAttention,
        stop: int | None = None,
    ) -> Any:
        self.fb = copy.copy(self.whole)
        embeds = self.input_embeds
        if rows is not None:
            self._take(rows, counts)
            embeds = None if embeds is None else embeds[rows]
        else:
            # Models count positions up (Gemma 3 of several modalities) and scale embeddings in
            # place, in every pass.
            self.fb.positions = self.whole.positions.clone()
            embeds = None if embeds is None else embeds.clone()
        result = self._pass(attention, stop, embeds)
        if rows is not None and stop is None:
            self._spread_experts(rows)
            self._spread_hidden_states(rows, result)
        return result

    def run_scratch(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor,
        counts: dict[int, int],
        attention: RowAttention,
        stop: int,
    ) -> None:
        n = ids.numel()
        fb = self.fb = copy.copy(self.whole)
        fb.input_ids = ids
        fb.positions = positions.clone()
        if self.whole.mrope_positions is not None:
            # Text alone: the same position on each axis.
            fb.mrope_positions = positions.repeat(self.whole.mrope_positions.shape[0], 1)
        # Slot 0 is the pool's padding slot: models that write KV in a fused kernel hit it only.
        fb.out_cache_loc = torch.zeros(n, dtype=torch.int64, device=ids.device)
        # A request's scratch rows are its adapter's.
        lora = self.whole.lora_ids
        fb.lora_ids = None if lora is None else [lora[i] for i in counts]
        fb.batch_size, fb.return_logprob = len(counts), False
        self._set_counts(list(counts.values()))
        self._pass(attention, stop)

    def next_logits(self, result: LogitsProcessorOutput) -> torch.Tensor:
        logits: torch.Tensor = result.next_token_logits
        return logits

    def _pass(
        self, attention: RowAttention, stop: int | None, embeds: torch.Tensor | None = None
    ) -> Any:
        fb = self.fb
        self._prepare_adapters()
        given = {} if embeds is None else {"input_embeds": embeds}
        try:
            with replaced(lambda base: BlendAttnBackend(base, attention, stop), fb):
                result = self._forward(fb.input_ids, fb.positions, fb, **given)
        except StopPass:
            return None
        finally:
            residual_batch.clear(fb)
        if stop is not None:
            raise SeamError(f"the model's forward ran past layer {stop}, where it was to be left")
        return result

    def _prepare_adapters(self) -> None:
        """Tell the adapters' layers whose the rows of this pass are (``ForwardBatch.init_new`` has
        told them for the whole batch)."""
        if self.lora is not None and not self.lora.attn_dp_enabled:
            self.lora.prepare_lora_batch(self.fb)

    def _spread_experts(self, rows: torch.Tensor) -> None:
        """Put the experts that the layers have noted row by row where the whole batch's rows
        are."""
        capturer = get_global_experts_capturer()
        if capturer is not None:
            noted = capturer.device_cache.buffer
            noted[rows] = noted[: rows.numel()].clone()

    def _spread_hidden_states(self, rows: torch.Tensor, result: LogitsProcessorOutput) -> None:
        """Where all rows' hidden states are captured they are read by the whole batch's rows; those
        of rows that did not run are zero, and no request reads them."""
        if result.hidden_states is not None and self.fb.capture_hidden_mode.is_full():
            hidden = result.hidden_states
            result.hidden_states = hidden.new_zeros(
                (self.whole.input_ids.shape[0], hidden.shape[1])
            )
            result.hidden_states[rows] = hidden

    def _take(self, rows: torch.Tensor, counts: list[int]) -> None:
        """Narrow the batch copy to ``rows`` of the whole batch, ``counts`` per request."""
        fb, whole = self.fb, self.whole
        fb.input_ids = whole.input_ids[rows]
        fb.positions = whole.positions[rows]
        fb.out_cache_loc = whole.out_cache_loc[rows]
        if whole.mrope_positions is not None:
            fb.mrope_positions = whole.mrope_positions[:, rows]
        if whole.extend_logprob_start_lens_cpu is not None:
            # Starts count from the piece's first row; what lies behind a start always runs.
            olds = zip(whole.extend_seq_lens_cpu, whole.extend_logprob_start_lens_cpu, strict=True)
            fb.extend_logprob_start_lens_cpu = [
                max(0, count - (old - start))
                for count, (old, start) in zip(counts, olds, strict=True)
            ]
        self._set_counts(counts)

    def _set_counts(self, counts: list[int]) -> None:
        fb, whole = self.fb, self.whole
        n = sum(counts)
        fb.extend_num_tokens = n
        fb.extend_seq_lens_cpu = list(counts)
        fb.extend_seq_lens = ops.upload(
            torch.tensor(counts, dtype=torch.int32), whole.extend_seq_lens.device
        )
        ends = torch.cumsum(fb.extend_seq_lens, 0, dtype=torch.int32)
        fb.extend_start_loc = ends - fb.extend_seq_lens
        if whole.global_num_token_non_padded_cpu is not None:
            fb.global_num_token_non_padded_cpu = n
        for name in ("global_num_token_non_padded", "num_token_non_padded"):
            value = getattr(whole, name, None)
            if value is not None:
                setattr(fb, name, torch.full_like(value, n))
