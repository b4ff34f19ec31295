"""Servers of models that are not the usual Llama, over HTTP. Needs: CPU, 3 GB of memory each.

Their KV and logits are checked in process (``tests/models``); here the launch, the plugin's own
settings, the tokenizer or processor, and the report are real.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers
from model_support.architectures import FLAGS
from model_support.media import MODELS, make_media_model
from model_support.world import model_for
from talk import Docs, ask, check_report, check_same


class Small(Docs):
    """Of the tokens that a vocabulary of 512 has beside the tokenizer's."""

    def tokens(self, n: int) -> list[int]:
        return [self.rng.randint(300, 511) for _ in range(n)]


@pytest.fixture(
    scope="module", params=["deepseek-v3", "gpt-oss", "qwen2.5-vl"], ids=["mla", "sinks", "images"]
)
def served(request, tmp_path_factory, start):
    """(the server, the model's name)"""
    arch, folder = request.param, tmp_path_factory.mktemp("family")
    model: Path
    if arch in MODELS:
        model, _ = make_media_model(folder, arch)
        transformers.Qwen2VLImageProcessor().save_pretrained(model)
        transformers.Qwen2VLVideoProcessor().save_pretrained(model)
    else:
        model = model_for(folder, arch)
    return start(model, ["--enable-blend", *FLAGS.get(arch, ())]), arch


def test_documents_in_another_order_are_reused(served) -> None:
    server, _ = served
    server.flush()
    docs = Small(31)
    docs.warm(server)
    prompt = docs.prompt([3, 1, 4, 0])
    blended = ask(server, prompt)
    check_report(blended)
    assert blended.blend["fallback"] is None, blended.blend
    assert blended.blend["reused"] > 200 and blended.blend["recomputed"] > 10, blended.blend


def test_all_recomputed_is_full_prefill(served) -> None:
    server, _ = served
    server.flush()
    docs = Small(32)
    prompt = docs.prompt([2, 0, 5])
    full = ask(server, prompt, custom={"blend": False})
    server.flush()
    docs.warm(server)
    again = ask(server, prompt, custom={"blend_ratio": 1.0})
    assert again.blend["recomputed"] > 150 and again.blend["fallback"] is None, again.blend
    check_same(again, full)
