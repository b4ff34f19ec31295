"""SGLang's own programs (``sglang.test.test_programs``) and chains of LangChain and LlamaIndex,
against plain SGLang and a blending server. Needs: CPU, real servers.

The model's weights are random: what runs here are the programs that ask for no right answer. The
others were run by hand on a real model (docs/requests.md).
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import sglang as sgl
from sglang.lang.backend.runtime_endpoint import RuntimeEndpoint
from sglang.test import test_programs as theirs
from talk import counts

RETRIEVAL = Path(__file__).resolve().parents[2] / "examples" / "retrieval.py"

#: program -> its arguments
PROGRAMS = {
    theirs.test_mt_bench: {},
    theirs.test_select: {"check_answer": False},
    theirs.test_expert_answer: {"check_answer": False},
    theirs.test_parallel_decoding: {},
    theirs.test_parallel_encoding: {"check_answer": False},
    theirs.test_stream: {},
}
#: asks for a route that SGLang's server does not have; ours does
OURS_ALONE = theirs.test_parallel_encoding


class Listening(RuntimeEndpoint):
    """SGLang's own client; keeps what each answer says of itself."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.told: list[dict] = []

    def generate(self, s, sampling_params):
        text, meta = super().generate(s, sampling_params)
        self.told.append(meta)
        return text, meta

    def generate_stream(self, s, sampling_params):
        last = None
        for text, meta in super().generate_stream(s, sampling_params):
            last = meta
            yield text, meta
        self.told.append(last)


def ran(server, program) -> list[dict]:
    before = sgl.global_config.default_backend
    backend = Listening(server.url)
    sgl.set_default_backend(backend)
    try:
        program(**PROGRAMS[program])
    finally:
        sgl.set_default_backend(before)
    return backend.told


by_name = {"ids": lambda p: p.__name__.removeprefix("test_")}


@pytest.mark.parametrize("program", [p for p in PROGRAMS if p is not OURS_ALONE], **by_name)
def test_against_plain_sglang(plain, program):
    assert ran(plain, program) or program is theirs.test_select


@pytest.mark.parametrize("program", PROGRAMS, **by_name)
def test_against_a_blending_server(blend, program):
    told = ran(blend, program)
    assert told or program is theirs.test_select  # which asks for logprobs alone
    for meta in told:
        report = meta["blend"]
        assert counts(report) == meta["prompt_tokens"]
        assert sum(report["sources"].values()) == report["reused"] + report["recomputed"]
        assert report["fallback"] in (None, "fewer reusable tokens than min_reused_tokens")


@pytest.fixture(scope="module")
def retrieval():
    spec = importlib.util.spec_from_file_location("retrieval", RETRIEVAL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("kind", ["langchain", "llamaindex"])
def test_retrieved_documents_are_reused(blend, retrieval, kind, capsys):
    """Each question brings them in its own order; its own texts are three of four."""
    orders = [retrieval.found(q) for q in retrieval.QUESTIONS]
    assert len({tuple(o) for o in orders}) == len(orders)
    ask = retrieval.KINDS[kind](blend.url)
    usages = [ask(q)[1] for q in retrieval.QUESTIONS]
    for usage in usages[1:]:
        kinds = ("exact_prefix", "approximate_prefix", "reused", "recomputed")
        reused = sum(usage[f"{kind}_tokens"] for kind in kinds)
        assert reused > 150, usages
    assert usages[-1]["reused_tokens"] > 100, usages
    retrieval.main([kind, "--url", blend.url])
    assert capsys.readouterr().out.count("reused") == len(retrieval.QUESTIONS)
