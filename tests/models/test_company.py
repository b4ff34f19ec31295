"""What shares a batch with a blended request, in process. Needs: CPU only.

Each kind of company has a check in ``model_support/checks_company.py``, with its negative control,
and runs in a child that holds one real model runner.
"""

from __future__ import annotations

import dataclasses
import inspect

import pytest

CHECKS = "model_support.checks_company:"


@pytest.mark.parametrize(
    ("kind", "arch", "page_size"),
    [
        ("embeddings", "llama", 1),
        ("embeddings", "qwen2", 16),
        ("hidden_states", "llama", 1),
        ("experts", "qwen3-moe", 1),
        ("prevented", "llama", 16),
    ],
)
def test_company(jobs, models, kind: str, arch: str, page_size: int) -> None:
    print(jobs.run(CHECKS + kind, str(models), arch, page_size))


@pytest.mark.parametrize(("arch", "page_size"), [("llama-gqa", 1), ("qwen3", 16)])
def test_adapters(jobs, models, arch: str, page_size: int) -> None:
    """Requests of two LoRA adapters and of the base model."""
    print(jobs.run("model_support.checks_adapters:adapters", str(models), arch, page_size))


def test_ngram(jobs, models) -> None:
    """A server that decodes by NGRAM's drafts."""
    print(jobs.run("model_support.checks_ngram:ngram", str(models), "qwen3"))


def test_each_field_of_a_batch_is_accounted_for() -> None:
    """A field that a later SGLang adds fails here before it fails a request's neighbour."""
    from sglang.srt.model_executor.forward_batch_deepseek_mha_mixin import (
        ForwardBatchDeepSeekMHAMixin,
    )
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch

    from sgl_blend.engine.forward import company

    fields = {field.name for field in dataclasses.fields(ForwardBatch)}
    latent = set(ForwardBatchDeepSeekMHAMixin.__annotations__)  # MLA models are refused at launch
    tables = (
        company.KEPT,
        company.PRUNED,
        company.EMBEDDED,
        company.SLOTS,
        company.PREVENTS.keys(),
        company.REFUSED,
    )
    known = [name for table in tables for name in table]
    assert len(known) == len(set(known)), "a field is in two tables"
    assert set(known) == fields - latent


#: what ``unservable`` and the planner ask of a request before it is blended
ASKED = """
    sampling_params return_logprob lora_id input_embeds positional_embed_overrides token_type_ids
    session return_hidden_states return_routed_experts return_indexer_topk
    multi_item_delimiter_indices token_indices_to_pool
"""
#: what tells tenants apart
TENANT = " extra_key cache_salt "
#: of a request's output rows, of the way it takes, or of what the launch refuses
NO_MATTER = """
    rid origin_input_text origin_input_ids origin_input_ids_unpadded top_logprobs_num
    token_ids_logprob return_sampling_mask sampling_logprobs_mode return_flat_raw_top_logprobs
    stream custom_logit_processor require_reasoning routed_experts_start_len eos_token_ids
    bootstrap_host bootstrap_port bootstrap_room disagg_mode routed_dp_rank disagg_prefill_dp_rank
    kv_hints vocab_size priority metrics_collector routing_key dimensions http_worker_ipc time_stats
    return_pooled_hidden_states decision_layout session_id dllm_config
"""


def test_each_wish_of_a_request_is_accounted_for() -> None:
    """As above, for what a request may say."""
    from sglang.srt.managers.schedule_batch import Req

    said = inspect.signature(Req.__init__).parameters.keys() - {"self"}
    assert set((ASKED + TENANT + NO_MATTER).split()) == said
