"""Which of SGLang's server options blending refuses, and that each of them has been looked at.

Needs: CPU; no server.
"""

from __future__ import annotations

import types

import msgspec
import pytest

from sgl_blend.engine.launch.checks import REFUSED, config_problems
from sgl_blend.engine.launch.disaggregation import (
    KEEPING,
    is_decode_node,
    watch_decode_nodes,
)
from sgl_blend.errors import UnsupportedError
from sgl_blend.gate.state import GateState

#: change what runs, the pool or the tree, and are served or decided by what is loaded
ON_THE_WAY = """
    model_path tokenizer_path skip_tokenizer_init load_format context_length enable_multimodal
    model_impl json_model_override_args dtype quantization quantization_param_path
    enable_fp32_lm_head modelopt_quant quantize_and_serve rl_quant_profile enable_tf32_matmul
    max_total_tokens chunked_prefill_size enable_dynamic_chunking max_prefill_tokens
    prefill_max_requests schedule_policy enable_priority_scheduling retraction_policy page_size
    swa_full_tokens_ratio disable_hybrid_swa_memory radix_eviction_policy_config
    disable_chunked_prefix_cache disable_overlap_schedule num_continuous_decode_steps
    enable_mixed_chunk nnodes node_rank tp_size dp_size moe_dp_size enable_dp_lm_head
    enable_tp_lm_head_all_to_all enable_shared_experts_attn_tp shared_experts_tp_size
    enable_dense_mlp_attn_tp disable_attn_tp_gather use_ray grpc_mode smg_grpc_mode
    preferred_sampling_params kv_events_config attention_backend decode_attention_backend
    enable_lean_attention prefill_attention_backend radix_cache_backend fp8_gemm_runner_backend
    fp4_gemm_runner_backend bf16_gemm_backend prefill_kv_cache_dequant_dtype dsa_prefill_backend
    dsv4_prefill_backend dsv4_attn_backend mamba_backend cuda_graph_config
    cuda_graph_backend_decode cuda_graph_backend_prefill disable_prefill_cuda_graph
    disable_decode_cuda_graph disable_cuda_graph triton_attention_reduce_in_fp32
    flashinfer_mla_disable_ragged enable_fused_qk_norm_rope enable_fused_moe_sum_all_reduce
    boundary_reduction enable_quant_communications enable_flashinfer_allreduce_fusion
    enable_aiter_allreduce_fusion enable_torch_compile enable_nvidia_megakernel
    enable_amd_monokernel speculative_ngram_external_corpus_path ep_size moe_runner_backend
    ep_num_redundant_experts ep_dispatch_algorithm init_expert_location enable_eplb
    expert_distribution_recorder_mode enable_waterfill enable_paged_experts
    disable_shared_experts_fusion uses_mamba_radix_cache enable_lora enable_lora_overlap_loading
    max_lora_rank lora_target_modules lora_paths max_loaded_loras max_loras_per_batch
    lora_eviction_policy lora_backend experts_shared_outer_loras lora_use_virtual_experts
    lora_strict_loading disaggregation_mode disaggregation_transfer_backend
    disaggregation_decode_retraction_backup optimistic_prefill_attempts
    disaggregation_decode_allocation_policy disaggregation_enable_kv_checksum encoder_only
    language_only language_model_only custom_weight_loader kv_canary_real_data
    debug_tensor_dump_output_folder enable_memory_saver enable_weights_cpu_backup
    enable_custom_logit_processor enable_return_hidden_states enable_return_routed_experts
    enable_return_indexer_topk enable_return_aux_hidden_states aux_hidden_state_capture
    return_aux_hidden_state_layer_ids forward_hooks msprobe_dump_config
    ple_offload_embedding swa_prefix_tails enable_encoder_swa_bounded_replay
    enable_decoder_swa_bounded_replay enable_cp_tp_group_sharing enable_watermark
    tokenizer_worker_num
"""
#: of the frontend, of decoding, of how weights and workers come to be, or of a model family that is
#: refused
NO_MATTER = """
    tokenizer_mode tokenizer_backend detokenizer_worker_num model_loader_extra_config
    trust_remote_code revision model_config_parser modelopt_checkpoint_restore_path
    modelopt_checkpoint_save_path modelopt_export_path mem_fraction_static max_running_requests
    max_queued_requests prefill_decode_interval disable_priority_preemption default_priority_value
    abort_on_priority_when_disabled schedule_low_priority_values_first
    priority_scheduling_preemption_threshold schedule_conservativeness c128_page_size
    scheduler_recv_interval nccl_port dist_timeout dist_init_addr gated_launch_port
    pp_max_micro_batch_size pp_async_batch_depth load_balance_method dcp_comm_backend
    dcp_replicate_q_proj cp_strategy enable_dsa_cache_layer_split enable_cp_decode_attn_tp
    enable_dp_attention_local_control_broadcast enable_p2p_check device base_gpu_id gpu_id_step
    random_seed mlx_enable_sampling watchdog_timeout soft_watchdog_timeout sleep_on_idle
    custom_sigquit_handler numa_node gc_threshold host port fastapi_root_path grpc_port
    grpc_worker_threads sidecar sidecar_args skip_server_warmup warmups enable_http2
    http2_max_concurrent_streams http2_initial_connection_window_size ssl_keyfile ssl_certfile
    ssl_ca_certs ssl_keyfile_password enable_ssl_refresh api_key admin_api_key served_model_name
    weight_version chat_template trust_request_chat_template hf_chat_template_name
    completion_template file_storage_path enable_cache_report return_input_ids return_output_ids
    reasoning_parser default_chat_template_kwargs strip_thinking_cache enable_strict_thinking
    tool_call_parser tool_server sampling_defaults asr_max_buffer_seconds
    asr_max_concurrent_sessions allow_auto_truncate stream_interval batch_notify_size
    stream_response_default_include_usage incremental_streaming_output log_level log_level_http
    log_requests log_requests_level log_requests_format log_requests_target
    uvicorn_access_log_exclude_prefixes crash_dump_folder show_time_cost enable_metrics
    smg_http_sidecar_port enable_mfu_metrics enable_metrics_for_all_schedulers
    load_snapshot_publish_interval tokenizer_metrics_custom_labels_header
    tokenizer_metrics_allowed_custom_labels extra_metric_labels bucket_time_to_first_token
    bucket_inter_token_latency bucket_e2e_request_latency prompt_tokens_buckets
    generation_tokens_buckets gc_warning_threshold_secs decode_log_interval
    enable_request_time_stats_logging load_publish_endpoint enable_forward_pass_metrics
    forward_pass_metrics_worker_id forward_pass_metrics_ipc_name enable_trace trace_modules
    otlp_traces_endpoint export_metrics_to_file export_metrics_to_file_dir stat_loggers
    constrained_json_whitespace_pattern constrained_json_disable_any_whitespace
    constrained_json_max_whitespace_cnt sampling_backend grammar_backend mm_attention_backend
    dsa_decode_backend dsa_paged_mqa_logits_backend dsa_topk_backend disable_flashinfer_autotune
    flashinfer_autotune_skip_ops cuda_graph_max_bs_decode cuda_graph_max_bs_prefill
    cuda_graph_bs_decode cuda_graph_bs_prefill cuda_graph_prefill_max_context
    disable_cuda_graph_padding enable_profile_cuda_graph enable_cudagraph_gc debug_cuda_graph
    enable_layerwise_nvtx_marker enable_nccl_nvls enable_symm_mem triton_attention_num_kv_splits
    triton_attention_split_tile_size enable_precise_embedding_interpolation
    enable_deepseek_v4_fp4_indexer disable_custom_all_reduce enable_mscclpp enable_torch_symm_mem
    enable_scattered_sconv pre_warm_nccl enforce_disable_flashinfer_allreduce_fusion
    flashinfer_allreduce_fusion_backend enable_torch_compile_debug_mode torch_compile_max_bs
    uno_lora_path speculative_draft_model_path speculative_draft_model_revision
    speculative_draft_load_format speculative_num_steps speculative_eagle_topk
    speculative_num_draft_tokens speculative_dflash_block_size speculative_dspark_block_size
    speculative_dspark_sps_table_path speculative_dspark_confidence_sts_path
    speculative_dspark_align_verify_tokens_to_graph_tier speculative_accept_threshold_single
    speculative_accept_threshold_acc speculative_use_rejection_sampling speculative_token_map
    speculative_attention_mode speculative_draft_attention_backend speculative_dsa_topk_backend
    speculative_draft_kv_cache_dtype speculative_draft_window_size speculative_moe_runner_backend
    speculative_moe_a2a_backend speculative_enable_w4a4_mxfp4_megamoe
    speculative_draft_model_quantization _speculative_draft_quantization_explicitly_set
    enable_multi_layer_eagle speculative_adaptive speculative_adaptive_config
    decoupled_spec_bind_endpoint decoupled_spec_connect_endpoints decoupled_spec_rank
    spec_trace_dir speculative_ngram_min_bfs_breadth speculative_ngram_max_bfs_breadth
    speculative_ngram_match_type speculative_ngram_max_trie_depth speculative_ngram_capacity
    speculative_ngram_external_sam_budget speculative_ngram_external_corpus_max_tokens
    enable_w4a4_mxfp4_megamoe deepep_v2_mode flashinfer_mxfp4_moe_precision deepep_mode fuseep_mode
    deepep_dispatcher_output_dtype eplb_algorithm eplb_rebalance_num_iterations
    eplb_rebalance_layers_per_chunk eplb_min_rebalancing_utilization_threshold
    expert_distribution_recorder_buffer_size expert_balancedness_report_mode deepep_config
    enable_elastic_expert_backup mooncake_ib_device ep_join_mode ep_join_rank_offset
    elastic_ep_initial_size max_ep_size elastic_ep_scale_timeout
    disable_flashinfer_cutlass_moe_fp4_allgather enforce_shared_experts_fusion max_mamba_cache_size
    mamba_ssm_dtype mamba_max_states_per_path enable_mamba_cache_stochastic_rounding
    mamba_cache_philox_rounds mamba_full_memory_ratio mamba_radix_cache_strategy
    mamba_track_interval enable_int8_mamba_checkpoint int8_mamba_ckpt_size linear_attn_backend
    linear_attn_decode_backend linear_attn_prefill_backend linear_attn_verify_backend
    enable_linear_replayssm linear_replayssm_cache_len enable_linear_replayssm_spec
    hicache_host_memory_mode hicache_ratio hicache_size hicache_write_policy hicache_io_backend
    hicache_mem_layout hicache_storage_backend hicache_storage_prefetch_policy
    hicache_storage_backend_extra_config hicache_storage_prefetch_retry_poll_interval
    hicache_storage_prefetch_retry_max_attempts unified_cache_external_linker_backend
    hisparse_config enable_broadcast_mm_inputs_process enable_prefix_mm_cache mm_enable_dp_encoder
    mm_process_config mm_processor_worker_num mm_io_worker_num allowed_media_domains
    media_url_max_file_size_mb mm_preprocess_cache_size_mb trust_mm_content_hashes
    limit_mm_data_per_request enable_mm_global_cache image_processor_backend
    mm_global_cache_backend disable_fast_image_processor mm_feature_transport max_lora_chunk_size
    lora_drain_wait_threshold tbo_token_distribution_threshold offload_num_in_group
    offload_prefetch_step offload_mode lmcache_config_file flexkv_config_file kt_method kt_cpuinfer
    kt_threadpool_count kt_num_gpu_experts kt_max_deferred_experts_per_token dllm_algorithm_config
    dllm_fdfo disaggregation_bootstrap_port disaggregation_ib_device num_reserved_decode_tokens
    disaggregation_decode_extra_slots disaggregation_decode_polling_interval
    encoder_transfer_backend encoder_urls encoder_bootstrap_port encoder_register_urls
    enable_adaptive_dispatch_to_encoder pdmux_config_path sm_group_num startup_weight_load_mode
    weight_loader_disable_mmap weight_loader_prefetch_checkpoints
    weight_loader_prefetch_num_threads weight_loader_drop_cache_after_load
    remote_instance_weight_loader_seed_instance_ip
    remote_instance_weight_loader_seed_instance_service_port
    remote_instance_weight_loader_send_weights_group_ports remote_instance_weight_loader_backend
    remote_instance_weight_loader_start_seed_via_transfer_engine engine_info_bootstrap_port
    modelexpress_config download_dir model_checksum delete_ckpt_after_loading decrypted_config_file
    decrypted_draft_config_file checkpoint_engine_wait_weights_before_ready enable_prefill_delayer
    prefill_delayer_max_delay_passes prefill_delayer_token_usage_low_watermark
    prefill_delayer_forward_passes_buckets prefill_delayer_wait_seconds_buckets
    prefill_delayer_queue_min_ratio prefill_delayer_max_delay_ms min_free_slots_delay
    kv_canary_sweep_interval enable_dynamic_batch_tokenizer dynamic_batch_tokenizer_batch_size
    dynamic_batch_tokenizer_batch_timeout enable_tokenizer_batch_encode
    disable_tokenizer_batch_decode debug_tensor_dump_layers debug_tensor_dump_input_file
    enable_draft_weights_cpu_backup return_hidden_states_mode sampling_mask_max_tokens
    disable_outlines_disk_cache weight_cache_mode weight_cache_socket weight_cache_timeout
    ple_offload_backend ple_offload_dir speculative_domino_candidate_pool_size
    flashinfer_a2a_dispatch_type cuda_graph_max_seq_len_prefill otlp_service_name
    _radix_eviction_policy_explicitly_set hicache_host_memory_fraction enable_linker_mla_dedup
    _swa_full_tokens_ratio_explicitly_set enable_response_store
    disaggregation_decode_host_receive_threshold qsa_indexer_dtype speculative_boundary_reduction
    speculative_use_block_verification speculative_draft_sink_size
    disable_aiter_allreduce_fusion_in_prefill disable_aiter_allreduce_fusion_in_decode
    dsa_triton_union enable_dsa_fused_indexer watermark_config watermark_key watermark_key_b
    watermark_context_window watermark_mixing_probability watermark_max_probability
    watermark_default_enabled watermark_enforce_all grpc_response_timeout_secs
    paged_experts_num_resident enable_megamoe_for_layernorm_sp enable_http_worker_reuseport
    prefill_decode_interval_min_bs unified_cache_external_linker_config
"""


def test_each_server_option_is_accounted_for() -> None:
    """An option that a later SGLang adds fails here before it changes a forward unseen."""
    from sglang.srt.server_args import ServerArgs

    tables = ([r.option for r in REFUSED], ON_THE_WAY.split(), NO_MATTER.split())
    known = [name for table in tables for name in table]
    assert len(known) == len(set(known)), "an option is in two tables"
    assert set(known) | set(KEEPING) == {field.name for field in msgspec.structs.fields(ServerArgs)}


def test_an_ordinary_server_has_no_problems() -> None:
    from sglang.srt.server_args import ServerArgs

    fields = msgspec.structs.fields(ServerArgs)
    defaults = {f.name: f.default for f in fields if f.default is not msgspec.NODEFAULT}
    assert config_problems(types.SimpleNamespace(**defaults)) == []


@pytest.mark.parametrize(
    ("option", "value", "line"),
    [
        ("speculative_algorithm", "EAGLE3", "--speculative-algorithm EAGLE3 (its draft model"),
        ("decoupled_spec_role", "verifier", "--decoupled-spec-role verifier"),
        ("pp_size", 2, "--pp-size 2 (pipeline parallelism)"),
        ("enable_dp_attention", True, "--enable-dp-attention (each forward is a collective"),
        ("attn_dp_size", 2, "--attn-dp-size 2 (DP attention; each forward"),
        ("attn_cp_size", 2, "--attn-cp-size 2 (context parallelism)"),
        ("enable_prefill_cp", True, "--enable-prefill-cp (context parallelism)"),
        ("dcp_size", 2, "--dcp-size 2 (decode context parallelism)"),
        ("dwdp_size", 2, "--dwdp-size 2 (its layers' weights"),
        *(
            ("moe_a2a_backend", name, f"--moe-a2a-backend {name} (SGLang pads and scatters")
            for name in ("deepep", "mooncake", "flashinfer", "mori", "nixl", "megamoe")
        ),
        ("moe_dense_tp_size", 1, "--moe-dense-tp-size 1 (SGLang pads"),
        ("enable_attn_tp_input_scattered", True, "--enable-attn-tp-input-scattered (SGLang pads"),
        ("enable_layernorm_sp", True, "--enable-layernorm-sp (SGLang pads"),
        ("elastic_ep_backend", "mooncake", "--elastic-ep-backend mooncake (a batch that met"),
        ("enable_two_batch_overlap", True, "--enable-two-batch-overlap"),
        ("enable_single_batch_overlap", True, "--enable-single-batch-overlap"),
        ("enable_pdmux", True, "--enable-pdmux (PD multiplexing)"),
        ("enable_pd_role_switch", True, "--enable-pd-role-switch"),
        ("is_embedding", True, "--is-embedding"),
        ("dllm_algorithm", "LowConfidence", "--dllm-algorithm LowConfidence"),
        ("enable_mis", True, "--enable-mis (multi-item scoring"),
        ("cpu_offload_gb", 4, "--cpu-offload-gb 4 (its layers' weights"),
        ("offload_group_size", 1, "--offload-group-size 1 (its layers' weights"),
        ("kt_weight_path", "/w", "--kt-weight-path /w (its layers' weights"),
        ("enable_deterministic_inference", True, "--enable-deterministic-inference (a blended"),
        ("rl_on_policy_target", "fsdp", "--rl-on-policy-target fsdp (a blended answer"),
        ("disable_radix_cache", True, "--disable-radix-cache"),
        ("enable_hierarchical_cache", True, "--enable-hierarchical-cache (HiCache)"),
        ("enable_lmcache", True, "--enable-lmcache"),
        ("enable_flexkv", True, "--enable-flexkv"),
        ("enable_unified_cache_external_linker", True, "--enable-unified-cache-external-linker"),
        ("enable_streaming_session", True, "--enable-streaming-session"),
        ("enable_session_radix_cache", True, "--enable-session-radix-cache"),
        ("radix_eviction_policy", "tlru", "--radix-eviction-policy tlru"),
        ("enable_unified_memory", True, "--enable-unified-memory (slots"),
        ("enable_page_major_kv_layout", True, "--enable-page-major-kv-layout (slots"),
        ("enable_kv_cache_sharding", True, "--enable-kv-cache-sharding (each rank"),
        ("enable_hisparse", True, "--enable-hisparse"),
        ("prefill_only_disable_kv_cache", True, "--prefill-only-disable-kv-cache"),
        ("kv_canary", "log", "--kv-canary log (it takes copied KV for damage)"),
        ("kv_cache_dtype", "fp4_e2m1", "--kv-cache-dtype fp4_e2m1"),
    ],
)
def test_an_option_that_cannot_be_served_is_named(option: str, value: object, line: str) -> None:
    [problem] = config_problems(types.SimpleNamespace(**{option: value}))
    assert problem.startswith(line)


def test_every_refused_option_is_tried_above() -> None:
    [mark] = test_an_option_that_cannot_be_served_is_named.pytestmark
    assert {case[0] for case in mark.args[1]} == {r.option for r in REFUSED}


@pytest.mark.parametrize("name", ["NGRAM", "ngram"])
def test_ngram_is_served(name: str) -> None:
    assert config_problems(types.SimpleNamespace(speculative_algorithm=name)) == []


@pytest.mark.parametrize("mode", ["null", "prefill"])
def test_a_prefill_node_is_served(mode: str) -> None:
    assert config_problems(types.SimpleNamespace(disaggregation_mode=mode)) == []


def _arguments(**given: object) -> types.SimpleNamespace:
    return types.SimpleNamespace(**given)


def test_a_decode_node_is_left_alone() -> None:
    assert is_decode_node(_arguments(disaggregation_mode="decode"))
    for mode in ("null", "prefill"):
        assert not is_decode_node(_arguments(disaggregation_mode=mode))
    assert not is_decode_node(_arguments())


@pytest.mark.parametrize("option", KEEPING)
def test_a_decode_node_that_keeps_prompts_is_refused(option: str) -> None:
    flag = "--" + option.replace("_", "-")
    with pytest.raises(UnsupportedError, match=f"{flag}: this decode node would keep blended KV"):
        is_decode_node(_arguments(disaggregation_mode="decode", **{option: True}))
    assert not is_decode_node(_arguments(disaggregation_mode="prefill", **{option: True}))


class _Ranks:
    """Two ranks; the other one's least values are given."""

    def __init__(self, *other: int) -> None:
        self.other = list(other)

    def least(self, values: list[int]) -> list[int]:
        return [min(values[0], self.other.pop(0))]


@pytest.mark.parametrize(
    ("mine", "other"), [((0, 5, 0), (0, 0, 0)), ((0, 0, 0), (0, -5, 0)), ((0, 9, 2), (0, -9, 0))]
)
def test_a_decode_node_that_keeps_prompts_ends_blending_on_all_ranks(mine, other, caplog) -> None:
    gate, decisions = GateState(0.1), []
    watch = watch_decode_nodes(gate, _Ranks(*other), lambda: decisions.append(gate.on))
    seen = []
    for kept in mine:
        watch(True, None, _arguments(disagg_decode_prefix_len=kept))
        seen.append(gate.on)
    assert seen == [True, False, False] and decisions == [False]
    [said] = [r for r in caplog.records if r.name.startswith("sgl_blend")]
    assert "--disaggregation-decode-enable-radix-cache" in said.getMessage()


def test_a_request_that_has_no_room_yet_says_nothing() -> None:
    gate = GateState(0.1)
    watch = watch_decode_nodes(gate, _Ranks(0), lambda: None)
    watch(False, None, _arguments(disagg_decode_prefix_len=7))
    assert gate.on
