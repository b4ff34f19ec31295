"""What shares a batch with a blended request, in process. Needs: CPU only.

Each kind of company has a check in ``model_support/checks_company.py``, with its negative control,
and runs in a child that holds one real model runner.
"""

from __future__ import annotations

import dataclasses

import pytest

CHECKS = "model_support.checks_company:"


@pytest.mark.parametrize(
    ("kind", "arch", "page_size"),
    [
        ("adapters", "llama", 1),
        ("adapters", "qwen3", 16),
        ("embeddings", "llama", 1),
        ("embeddings", "qwen2", 16),
        ("hidden_states", "llama", 1),
        ("experts", "qwen3-moe", 1),
        ("prevented", "llama", 16),
    ],
)
def test_company(jobs, models, kind: str, arch: str, page_size: int) -> None:
    print(jobs.run(CHECKS + kind, str(models), arch, page_size))


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
