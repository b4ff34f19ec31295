"""Every SGLang symbol (0.5.23) that is imported, called or overridden without a hook.

``seams.verify`` looks for each at launch, and compares the parameters of those that are overridden.
``tests/unit/test_seams.py`` reads the source and fails where an import, an inherited method or an
override is missing here. Methods of SGLang's objects that are called on an attribute are listed by
hand.
"""

from __future__ import annotations

USED = (
    "sglang.srt.arg_groups.model_override_base.model_config_of",
    "sglang.srt.arg_groups.overrides.resolution_result",
    "sglang.srt.arg_groups.overrides.resolving_view",
    "sglang.srt.configs.hybrid_arch.mambaish_config",
    "sglang.srt.configs.linear_attn_model_registry.get_linear_attn_config",
    "sglang.srt.configs.model_config.AttentionArch",
    "sglang.srt.configs.model_config.get_hybrid_layer_ids",
    "sglang.srt.configs.model_config.is_hybrid_swa_model",
    "sglang.srt.entrypoints.engine.Engine",
    "sglang.srt.entrypoints.http_server",
    "sglang.srt.eplb.expert_distribution.get_global_expert_distribution_recorder",
    "sglang.srt.layers.attention.attention_registry.register_attention_backend",
    "sglang.srt.layers.attention.torch_native_backend.TorchNativeAttnBackend",
    "sglang.srt.layers.layer_boundary.residual.batch",
    "sglang.srt.layers.layer_boundary.residual.batch.clear",
    "sglang.srt.layers.radix_attention.RadixAttention",
    "sglang.srt.layers.rotary_embedding.factory.get_rope",
    "sglang.srt.lora.lora_manager.LoRAManager.prepare_lora_batch",
    "sglang.srt.managers.schedule_batch.Req",
    "sglang.srt.managers.schedule_batch.ScheduleBatch",
    "sglang.srt.managers.schedule_batch.ScheduleBatch.prepare_for_extend",
    "sglang.srt.managers.schedule_policy.AddReqResult",
    "sglang.srt.managers.schedule_policy.PrefillAdder.ceil_paged_tokens",
    "sglang.srt.managers.scheduler.Scheduler.is_fully_idle",
    "sglang.srt.mem_cache.allocator.base.BaseTokenToKVPoolAllocator.free_segment",
    "sglang.srt.mem_cache.base_prefix_cache.BasePrefixCache.lock",
    "sglang.srt.mem_cache.base_prefix_cache.BasePrefixCache.unlock",
    "sglang.srt.mem_cache.base_prefix_cache.InsertParams",
    "sglang.srt.mem_cache.base_prefix_cache.InsertResult",
    "sglang.srt.mem_cache.base_prefix_cache.MatchPrefixParams",
    "sglang.srt.mem_cache.base_prefix_cache.MatchResult",
    "sglang.srt.mem_cache.common.checkpoint_kv_cache",
    "sglang.srt.mem_cache.common.release_kv_cache",
    "sglang.srt.mem_cache.events.KVCacheEventRecorder",
    "sglang.srt.mem_cache.events.KVCacheEventRecorder.record_all_cleared",
    "sglang.srt.mem_cache.memory_pool.KVWriteLoc",
    "sglang.srt.mem_cache.memory_pool.MHATokenToKVPool",
    "sglang.srt.mem_cache.memory_pool.MHATokenToKVPool.set_kv_buffer",
    "sglang.srt.mem_cache.memory_pool.MLATokenToKVPool",
    "sglang.srt.mem_cache.memory_pool.MLATokenToKVPool.set_kv_buffer",
    "sglang.srt.mem_cache.memory_pool.ReqToTokenPool.write",
    "sglang.srt.mem_cache.radix_cache.RadixCache",
    "sglang.srt.mem_cache.radix_cache.RadixCache._insert_helper",
    "sglang.srt.mem_cache.radix_cache.RadixCache._match_prefix_helper",
    "sglang.srt.mem_cache.radix_cache.RadixCache.path_device_indices",
    "sglang.srt.mem_cache.radix_cache.RadixKey",
    "sglang.srt.mem_cache.radix_cache.RadixKey.child_key_at",
    "sglang.srt.mem_cache.radix_cache.RadixKey.page_aligned",
    "sglang.srt.mem_cache.radix_cache.TreeNode",
    "sglang.srt.mem_cache.registry.register_radix_cache_backend",
    "sglang.srt.mem_cache.registry.registered_radix_cache_backends",
    "sglang.srt.model_executor.forward_batch_info.CaptureHiddenMode",
    "sglang.srt.model_executor.forward_batch_info.ForwardBatch",
    "sglang.srt.model_executor.forward_context.forward_context",
    "sglang.srt.model_executor.forward_context.get_forward_context",
    "sglang.srt.models.deepseek_common.attention_backend_handler.AttentionBackendRegistry",
    "sglang.srt.models.deepseek_common.attention_backend_handler.AttentionBackendRegistry.register",
    "sglang.srt.models.deepseek_common.attention_forward_methods.forward_methods.AttnForwardMethod",
    "sglang.srt.platforms.cpu.CpuDeviceMixin",
    "sglang.srt.platforms.current_platform",
    "sglang.srt.platforms.device_mixin.PlatformEnum",
    "sglang.srt.platforms.interface.PlatformCapabilities",
    "sglang.srt.platforms.interface.SRTPlatform",
    "sglang.srt.plugins.hook_registry.HookRegistry",
    "sglang.srt.plugins.hook_registry.HookType",
    "sglang.srt.plugins.load_plugins",
    "sglang.srt.runtime_context.get_exec",
    "sglang.srt.runtime_context.get_observability",
    "sglang.srt.runtime_context.get_parallel",
    "sglang.srt.runtime_context.get_schedule",
    "sglang.srt.sampling.sampling_params.SamplingParams",
    "sglang.srt.speculative.spec_info.SpeculativeAlgorithm",
    "sglang.srt.state_capturer.routed_experts.get_global_experts_capturer",
    "sglang.srt.utils.hf_transformers_utils.get_tokenizer",
    "sglang.srt.utils.hf_transformers.config.get_config",
)

#: overridden method -> its parameters
OVERRIDDEN = {
    "sglang.srt.layers.attention.torch_native_backend.TorchNativeAttnBackend.forward_decode": (
        "(self, q, k, v, layer, forward_batch, save_kv_cache)"
    ),
    "sglang.srt.layers.attention.torch_native_backend.TorchNativeAttnBackend.forward_extend": (
        "(self, q, k, v, layer, forward_batch, save_kv_cache)"
    ),
    "sglang.srt.mem_cache.events.KVCacheEventRecorder.record_remove": "(self, node, medium)",
    "sglang.srt.mem_cache.events.KVCacheEventRecorder.record_store": (
        "(self, node, medium, session_id)"
    ),
    "sglang.srt.mem_cache.radix_cache.RadixCache._delete_leaf": "(self, node)",
    "sglang.srt.mem_cache.radix_cache.RadixCache._split_node": "(self, key, child, split_len)",
    "sglang.srt.mem_cache.radix_cache.RadixCache.checkpoint": "(self, req, up_to)",
    "sglang.srt.mem_cache.radix_cache.RadixCache.insert": "(self, params)",
    "sglang.srt.mem_cache.radix_cache.RadixCache.match_prefix": "(self, params)",
    "sglang.srt.mem_cache.radix_cache.RadixCache.reset": "(self)",
    "sglang.srt.platforms.cpu.CpuDeviceMixin.get_device": "(self, device_id)",
    "sglang.srt.platforms.device_mixin.DeviceMixin.is_pin_memory_available": "(self, device)",
    "sglang.srt.platforms.interface.SRTPlatform.apply_server_args_defaults": "(self, server_args)",
    "sglang.srt.platforms.interface.SRTPlatform.get_default_attention_backend": "(self)",
    "sglang.srt.platforms.interface.SRTPlatform.post_load_model": "(self, model)",
    "sglang.srt.platforms.interface.SRTPlatform.get_dispatch_key_name": "(self)",
    "sglang.srt.platforms.interface.SRTPlatform.init_backend": "(self)",
}
