"""What SGLang prepares for a whole batch, and what blending one of its requests does to the others.

Blended passes prune the batch's rows (``model_passes.py``). Whatever a ``ForwardBatch`` holds for
each row or each request must then still be true of the requests beside a blended one. Each of its
fields (SGLang 0.5.23) is in one of the tables below; where a batch holds something that pruned rows
cannot follow, none of it is blended, and that is known before anything is planned.

Beside the fields, by row: adapters' segments are prepared anew for each pass; hidden states and
noted experts are put back at the whole batch's rows. By request, and thus untouched: sampling
parameters, penalties, grammars, logit processors, watermarks, beam groups, log-probabilities of the
prompt (the rows from their start on always run).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from sglang.srt.managers.schedule_batch import ScheduleBatch
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch

#: One value for the batch or one entry a request: true of pruned rows as it is.
KEPT = frozenset(
    """
    forward_mode batch_size req_pool_indices req_pool_indices_cpu seq_lens seq_lens_cpu seq_lens_sum
    orig_seq_lens extend_prefix_lens extend_prefix_lens_cpu return_logprob is_prefill_only
    spec_algorithm contains_last_prefill_chunk lora_ids rids watermark_prompt_tail_ids
    watermark_context_hash_history sampling_info top_logprobs_nums token_ids_logprobs temperature
    top_p next_token_logits_buffer extend_input_logprob_token_ids_gpu capture_hidden_mode
    return_hidden_states_before_norm defer_logits_to_eager full_prefill_cuda_graph_capture
    is_extend_in_batch can_run_decode_cuda_graph can_run_dp_draft_cuda_graph
    can_run_dp_prefill_cuda_graph dp_prefill_cuda_graph_max_prefix_len max_seq_len_host
    max_seq_len_override forward_metadata_ready forward_metadata_planned_bs
    forward_metadata_planned_num_tokens forward_metadata_replan_equivalent rids_int
    bootstrap_room_ids_int dimensions return_pooled_hidden_states attn_tp_sequence_sharded
    req_all_ids_flat req_all_ids_lens spec_info
    """.split()
)
#: Narrowed to the rows of each pass, or what its layers leave to one another.
PRUNED = frozenset(
    """
    input_ids positions out_cache_loc mrope_positions extend_seq_lens extend_seq_lens_cpu
    extend_start_loc extend_num_tokens extend_logprob_start_lens_cpu global_num_token_non_padded
    global_num_token_non_padded_cpu num_token_non_padded hidden_states residual residual_stream
    model_specific_states split_index
    """.split()
)
#: Put into ``input_embeds`` before the model's ``forward``, where rows are taken from it.
EMBEDDED = frozenset({"replace_embeds", "replace_positions"})
#: The whole batch's slots for its whole forward; nothing on the path of pruned rows reads them.
SLOTS = frozenset("kv_loc_plan kv_loc_cols out_cache_loc_virtual out_cache_loc_is_physical".split())
#: Set for a request that is prepared by rows or positions of the whole batch: no request is
#: blended.
PREVENTS = {
    # As SGLang prepares it, such a batch holds fewer embeddings than rows.
    "input_embeds": "input embeddings in the batch",
    "mm_inputs": "multimodal input in the batch",
    "mm_token_modalities": "multimodal input in the batch",
    "multi_gate_indices": "multimodal input in the batch",
    "mm_input_embeds": "multimodal input in the batch",
    "token_type_ids": "token types in the batch",
    "multi_item_delimiter_indices": "scoring request in the batch",
    "token_indices_to_pool": "scoring request in the batch",
    "decision_layouts": "scoring request in the batch",
}
#: Of configurations and model families that the launch refuses, of decoding, or of a CUDA graph.
REFUSED = frozenset(
    """
    origin_out_cache_loc out_cache_loc_dsv4 mamba_track_indices mamba_track_mask mamba_track_seqlens
    mamba_prefill_track_mask_cpu mamba_track_seqlens_cpu mamba_cow_src_indices mamba_cow_dst_indices
    mamba_clear_indices dllm_input_preparation_state dllm_prompt_mask encoder_lens
    encoder_out_cache_loc encoder_cached encoder_lens_cpu cross_attention_custom_mask
    encoder_swa_replay encoder_swa_row_floor encoder_swa_compress_rows
    dp_spec_prefill_coordination_applied global_forward_mode tbo_split_seq_index
    tbo_parent_token_range tbo_padded_len tbo_children reuse_dsa_topk_indices
    minimax_m3_precached_sparse_layers original_global_num_tokens_cpu _original_batch_size
    _original_forward_mode _original_num_tokens global_num_tokens_cpu global_num_tokens_gpu
    global_num_tokens_for_logprob_cpu global_num_tokens_for_logprob_gpu dp_padding_mode
    dp_local_start_pos dp_local_num_tokens global_dp_buffer_len global_num_tokens_padded_cpu
    global_late_layer_num_tokens_cpu attn_cp_metadata attn_dcp_metadata dcp_kv_mask
    ngram_embedding_info engram_history engram_staged_rows llada_image_conditioning_text_lens_cpu
    _attn_output aux_hidden_states_buffer
    """.split()
)


def why_not(
    forward_batch: ForwardBatch, batch: ScheduleBatch, model: torch.nn.Module
) -> str | None:
    """Why no request of this prefill batch can be blended, or None.

    batch: the ``ScheduleBatch`` that ``forward_batch`` was made of.
    """
    for name, reason in PREVENTS.items():
        if _holds(getattr(forward_batch, name)):
            return reason
    if getattr(model, "capture_aux_hidden_states", False) and batch.return_hidden_states:
        return "hidden states of inner layers in the batch"
    if _notes_experts_of_each_token():
        return "experts of each token recorded"
    return None


def rows_are_bounded() -> bool:
    """May a batch hold more rows than a piece, as long as no pass runs more? Not where what SGLang
    records goes by the batch's rows."""
    return not (notes_experts() or _notes_experts_of_each_token())


def _holds(value: Any) -> bool:
    """Does a field hold anything? A list has one entry a request."""
    if isinstance(value, list):
        return any(entry is not None for entry in value)
    return value is not None


def _notes_experts_of_each_token() -> bool:
    """Is ``ExpertDistributionRecorder`` recording by rows? (Its other modes count what was run.)"""
    from sglang.srt.eplb.expert_distribution import get_global_expert_distribution_recorder
    from sglang.srt.runtime_context import get_exec

    recorder = get_global_expert_distribution_recorder()
    return recorder.recording and get_exec().moe.expert_distribution_recorder_mode == "per_token"


def capture_nothing(forward_batch: ForwardBatch) -> None:
    """No request of the batch asks for hidden states: the server captures them only in case one
    does."""
    from sglang.srt.model_executor.forward_batch_info import CaptureHiddenMode

    forward_batch.capture_hidden_mode = CaptureHiddenMode.NULL


def notes_experts() -> bool:
    """Does SGLang keep, for each slot of the pool, the experts its token went to
    (``--enable-return-routed-experts``)? A slot that no layer has filled has none."""
    from sglang.srt.state_capturer.routed_experts import get_global_experts_capturer

    return get_global_experts_capturer() is not None
