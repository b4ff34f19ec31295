"""NGRAM speculative decoding: prefill is blended, the verification of drafts is SGLang's own.

SGLang's worker (``speculative/ngram_worker.py``, 0.5.23) needs kernels that a CPU does not have.
Here a chain of drafts is made by hand and verified through the same seam: a ``ScheduleBatch`` in
the mode ``TARGET_VERIFY``, ``ForwardBatch.init_new``, ``ModelRunner.forward``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import torch
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.managers.schedule_batch import ScheduleBatch
from sglang.srt.mem_cache.common import release_kv_cache
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode
from sglang.srt.speculative.ngram_info import NgramVerifyInput
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

from model_support.asks import Ask, Outcome
from model_support.checks_blend import LOGITS, ORDERS
from model_support.compare import apart, require_equal
from model_support.engine import Engine, _Live
from model_support.world import World, model_for, must_fail
from sgl_blend import attach

#: tokens that are verified at once
DRAFTS = 4
NEW = 11


class NgramEngine(Engine):
    """Decodes by drafts. ``guesses``: each prompt's answer, as far as it is guessed."""

    speculative = SpeculativeAlgorithm.NGRAM
    guesses: dict[tuple[int, ...], list[int]]

    def _decode(self, batch: ScheduleBatch, done: list[_Live]) -> None:
        keep = [i for i, r in enumerate(batch.reqs) if any(r is one.req for one in done)]
        batch.filter_batch(keep_indices=[i for i in keep if not batch.reqs[i].finished()])
        while batch.reqs:
            self._verify(batch)
            keep = [i for i, r in enumerate(batch.reqs) if not r.finished()]
            batch.filter_batch(keep_indices=keep)

    def _verify(self, batch: ScheduleBatch) -> None:
        bs, before = len(batch.reqs), batch.seq_lens.clone()
        drafts, slots = [], self.allocator.alloc(bs * DRAFTS).view(bs, DRAFTS)
        for req, start, mine in zip(batch.reqs, before.tolist(), slots, strict=True):
            guess = self.guesses.get(tuple(req.origin_input_ids), [])[len(req.output_ids) :]
            drafts.append([req.output_ids[-1], *guess, *[7] * DRAFTS][:DRAFTS])
            self.rows.write((req.kv.req_pool_idx, slice(start, start + DRAFTS)), mine)
        ids = torch.tensor(drafts)
        batch.forward_mode = ForwardMode.TARGET_VERIFY
        batch.input_ids, batch.out_cache_loc = ids.flatten(), slots.flatten()
        batch.spec_info = NgramVerifyInput(
            draft_token=ids.flatten(),
            custom_mask=torch.ones(1, dtype=torch.bool),
            positions=(before[:, None] + torch.arange(DRAFTS)).flatten(),
            draft_token_num=DRAFTS,
        )
        with torch.no_grad():
            forward = ForwardBatch.init_new(
                batch, self.runner, return_hidden_states_before_norm=False
            )
            assert attach.PIECES.get(forward) is None, "a verification is planned"
            logits = self.runner.forward(forward).logits_output.next_token_logits
        best = logits.view(bs, DRAFTS, -1).argmax(dim=-1)
        for i, req in enumerate(batch.reqs):
            accepted = 0
            while not req.finished() and accepted < DRAFTS:
                req.output_ids.append(int(best[i, accepted]))
                req.update_finish_state()
                accepted += 1
                if accepted < DRAFTS and best[i, accepted - 1] != ids[i, accepted]:
                    break
            self.accepted.append(accepted)
            self.allocator.free(slots[i, accepted:])
            req.kv.kv_committed_len += accepted
            req.kv.kv_allocated_len += accepted
            before[i] += accepted
            if req.finished():
                release_kv_cache(req, self.tree, checkpoint=True)
        batch.forward_mode, batch.spec_info = ForwardMode.DECODE, None
        batch.seq_lens, batch.seq_lens_cpu = before, before.clone()

    accepted: list[int]


def _chains() -> Any:
    """SGLang's plain attention on a CPU cannot verify; a chain of drafts is an extension."""
    extend = TorchNativeAttnBackend.forward_extend

    def forward_extend(self: Any, q: Any, k: Any, v: Any, layer: Any, batch: Any, **kw: Any) -> Any:
        if batch.forward_mode.is_target_verify() and batch.extend_seq_lens is None:
            batch.extend_prefix_lens = batch.seq_lens
            batch.extend_seq_lens = torch.full_like(batch.seq_lens, DRAFTS)
            batch.seq_lens = batch.seq_lens + DRAFTS
        return extend(self, q, k, v, layer, batch, **kw)

    return mock.patch.object(TorchNativeAttnBackend, "forward_extend", forward_extend)


def ngram(models: str, arch: str) -> dict[str, Any]:
    """In a child: the answers of a server that drafts are those of one that does not, for exact
    requests and for blended ones, alone and in one batch."""
    model = model_for(Path(models), arch)
    args = ["--speculative-algorithm", "NGRAM", "--speculative-num-draft-tokens", str(DRAFTS)]
    # A kernel that moves the KV of accepted drafts; a chain's lies where it belongs.
    with mock.patch.object(MHATokenToKVPool, "_init_kv_copy_and_warmup", lambda self: None):
        engine = NgramEngine(model, args=args)
    engine.guesses, engine.accepted = {}, []
    assert engine.gate.on, [str(f) for f in engine.findings]
    with _chains():
        world = World(engine, model)
        asks = [
            Ask(world.desk.prompt(order, head)[0], policy=policy, ratio=ratio, new_tokens=NEW)
            for order, head in ORDERS
            for policy, ratio in (("all", None), ("query", 0.25), ("hkvd", 0.25), ("leading", 0.25))
        ]
        plain = [_plainly(world, ask) for ask in asks]
        for ask, one in zip(asks, plain, strict=True):
            # Right as far as it goes, wrong from somewhere on, right again.
            right = list(one.tokens)
            right[5] = (right[5] + 1) % 300
            engine.guesses[tuple(ask.tokens)] = right
        engine.accepted.clear()
        world.stock()
        together = engine.run(*asks)
        for ask, one, ours in zip(asks, plain, together, strict=True):
            _same(ask, one, ours)
        for ask, one in zip(asks, plain, strict=True):
            world.stock()
            _same(ask, one, engine.run(ask)[0])
        engine.check()
        assert {1, DRAFTS} <= set(engine.accepted), "nothing is accepted, or all"
        for ask, one in zip(asks[:1], plain[:1], strict=True):
            require_equal(one, world.full(ask.tokens, NEW), "exact")
        must_fail("a draft that is no chain's", lambda: _bites(world, asks[1], plain[1]))
    return {"accepted": sum(engine.accepted) / len(engine.accepted), "asks": len(asks)}


def _plainly(world: World, ask: Ask) -> Outcome:
    """Token by token."""
    with mock.patch.object(NgramEngine, "_decode", Engine._decode):
        with mock.patch.object(NgramEngine, "speculative", SpeculativeAlgorithm.NONE):
            world.stock()
            [outcome] = world.engine.run(ask)
    assert len(outcome.tokens) == NEW
    return outcome


def _same(ask: Ask, plain: Outcome, ours: Outcome) -> None:
    assert ours.report == plain.report, f"{ours.report} instead of {plain.report}"
    if ask.policy != "all":
        assert ours.report["reused"] > 0
    assert apart(ours.logits, plain.logits) <= LOGITS
    assert ours.tokens == plain.tokens, f"{ask.policy}: {ours.tokens} instead of {plain.tokens}"


def _bites(world: World, ask: Ask, plain: Outcome) -> None:
    """With a wrong position the answer is another one."""
    init = NgramVerifyInput.__init__

    def late(self: Any, *args: Any, positions: torch.Tensor, **kw: Any) -> None:
        init(self, *args, positions=positions + 40, **kw)

    with mock.patch.object(NgramVerifyInput, "__init__", late):
        world.stock()
        _same(ask, plain, world.engine.run(ask)[0])
