"""A prefill node that blends, and a decode node beside it: KV goes over Mooncake's TCP transport.
Needs: CPU, two real servers, the Mooncake transfer engine."""

from __future__ import annotations

import random

import cpu_transfer
import pytest
import requests
from talk import Docs, all_at_once, ask, body_of, check_report

from sgl_blend.harness.client import Answer, answer_of
from sgl_blend.harness.process import free_port
from sgl_blend.harness.server import PLAIN_ON_CPU

EXACT = {"blend": False}
ALL = {"blend_policy": "all"}
#: a decode node that keeps the KV of requests it interrupts needs memory registered with a GPU
DECODE = ["--disaggregation-decode-retraction-backup", "cpu_tensor"]


class Pair:
    """Sends each request to both, as SGLang's router does."""

    def __init__(self, start, model, env: dict[str, str]) -> None:
        transfer = ["--disaggregation-transfer-backend", "mooncake_tcp"]
        self.port = free_port()
        prefill = ["--enable-blend", "--disaggregation-mode", "prefill", *transfer]
        # Overlapped, the node waits for the KV of cached prefixes by a CUDA event.
        prefill += ["--disable-overlap-schedule", "--disaggregation-bootstrap-port", str(self.port)]
        # The decode node runs SGLang as it is.
        settings = [x for pair in PLAIN_ON_CPU.items() for x in pair if x]
        decode = ["--enable-blend", "--disaggregation-mode", "decode", *transfer, *DECODE]
        self.prefill, self.decode = all_at_once(
            [
                lambda: start(model, prefill, env),
                lambda: start(model, [*decode, *settings], env),
            ]
        )

    def ask(self, prompt, new: int = 8, **more) -> tuple[Answer, Answer]:
        """(the prefill node's answer, the decode node's)"""
        body = body_of(prompt, new=new, **more)
        body |= {
            "bootstrap_host": "127.0.0.1",
            "bootstrap_port": self.port,
            "bootstrap_room": random.randrange(1 << 40),
        }
        first, last = all_at_once(
            [lambda s=s: s.generate(**body) for s in (self.prefill, self.decode)]
        )
        return answer_of(first), answer_of(last)


@pytest.fixture(scope="module")
def pair(model, start, tmp_path_factory) -> Pair:
    return Pair(start, model, cpu_transfer.install(tmp_path_factory.mktemp("plugin")))


def test_both_say_what_they_do(pair):
    assert "this prefill node blends" in pair.prefill.log.read_text()
    log = pair.decode.log.read_text()
    assert "a decode node computes no prompts" in log
    assert "BlendRadixCache" not in log and "sgl-blend is on" not in log


def test_what_is_decoded_is_what_was_blended(pair, plain, blend):
    """Beside a server that does both, and was sent the same."""
    docs = Docs(80)
    for d in docs.docs:
        prompt = [1, *d, 3, *docs.tokens(40)]
        pair.ask(prompt, new=1, custom=EXACT)
        ask(blend, prompt, new=1, custom=EXACT)
    for order in ([2, 0, 1], [5, 3], [4, 1, 0, 2]):
        for custom in (ALL, {}):
            prompt = docs.prompt(order)
            first, last = pair.ask(prompt, custom=custom)
            check_report(first)
            both = ask(blend, prompt, custom=custom)
            assert first.blend == both.blend and both.blend["fallback"] is None
            assert both.blend["recomputed"] > 0 and (both.blend["reused"] > 0 or custom is ALL)
            assert last.tokens == both.tokens and last.blend is None
            if custom is ALL:
                assert last.tokens == ask(plain, prompt).tokens
    # Who asked for exact has exact KV, whatever was blended of the same prompt before.
    first, last = pair.ask(prompt, custom=EXACT)
    assert first.blend["fallback"] == "disabled by the request"
    assert last.tokens == ask(plain, prompt).tokens


def test_both_are_well(pair):
    for server in (pair.prefill, pair.decode):
        assert requests.get(server.url + "/health", timeout=60).status_code == 200
        assert server.alive()
