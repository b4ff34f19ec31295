"""Prefills of prompts that nobody has sent, through SGLang's own batches.

The order of calls is ``Scheduler``'s (SGLang 0.5.23): ``Req.init_next_round_input``,
``RadixCache.lock``, ``ScheduleBatch.prepare_for_extend``, ``ForwardBatch.init_new``,
``ModelRunner.forward``, ``release_kv_cache``. No token is sampled and no request reaches the
scheduler. A prompt matches no prefix and enters the tree only where it is to be kept. Not for use
beside a running batch: at launch, or while idle.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from itertools import count
from typing import TYPE_CHECKING

import torch

from sgl_blend import attach

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
    from sglang.srt.mem_cache.registry import TreeCacheBuildContext
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.model_executor.model_runner import ModelRunner

    from sgl_blend.tree.cache import BlendRadixCache

_RIDS = count()


class Prefills:
    """See the module's docstring. ``build``: SGLang's ``TreeCacheBuildContext``."""

    def __init__(self, build: TreeCacheBuildContext, tree: BlendRadixCache) -> None:
        self.runner: ModelRunner = build.tp_worker.model_runner
        self.tree = tree
        self.vocab: int = build.model_config.vocab_size
        self.rows = build.params.req_to_token_pool
        self.allocator = build.params.token_to_kv_pool_allocator

    def request(self, tokens: Sequence[int], keep: bool = False) -> Req:
        """keep: leave the KV where later prompts can reuse it, as a served request does."""
        from sglang.srt.managers.schedule_batch import Req
        from sglang.srt.sampling.sampling_params import SamplingParams

        params = SamplingParams(temperature=0, max_new_tokens=1, ignore_eos=True)
        params.normalize(None)
        req = Req(
            rid=f"sgl-blend-gate-{next(_RIDS)}",
            origin_input_text="",
            origin_input_ids=array("q", tokens),
            sampling_params=params,
            vocab_size=self.vocab,
        )
        req.skip_radix_cache_insert = not keep
        return req

    def begin_piece(self, req: Req, most: int | None = None) -> None:
        """Its next piece is all that is left, or ``most`` tokens in whole pages."""
        page = self.tree.page_size
        req.init_next_round_input()
        if req.lock is None:
            req.last_node = self.tree.root_node
            req.lock = self.tree.lock(req.last_node)
        left = len(req.full_untruncated_fill_ids) - req.prefix_len
        take = left if most is None else min(most, left)
        if take < left:
            take = min(left, max(page, take // page * page))
        req.extend_end = req.prefix_len + take

    def batch(self, reqs: Sequence[Req]) -> ScheduleBatch:
        """One batch of the pieces that have begun."""
        from sglang.srt.managers.schedule_batch import ScheduleBatch
        from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

        batch = ScheduleBatch.init_new(
            reqs=list(reqs),
            req_to_token_pool=self.rows,
            token_to_kv_pool_allocator=self.allocator,
            tree_cache=self.tree,
            model_config=self.runner.model_config,
            enable_overlap=False,
            spec_algorithm=SpeculativeAlgorithm.NONE,
        )
        batch.prepare_for_extend()
        return batch

    def forward(
        self,
        batch: ScheduleBatch,
        change: Callable[[ForwardBatch], None] | None = None,
        eager: bool = False,
    ) -> tuple[torch.Tensor, ForwardBatch]:
        """The next tokens' logits [requests, vocab]. change: is called before the model runs.
        eager: without prefill graphs, which hold SGLang's own attention."""
        from sglang.srt.model_executor.forward_batch_info import ForwardBatch

        if batch.input_ids is None:
            batch.input_ids = batch.prefill_input_ids_cpu.to(batch.device)
            batch.prefill_input_ids_cpu = None
        with torch.no_grad():
            forward = ForwardBatch.init_new(
                batch, self.runner, return_hidden_states_before_norm=False
            )
            if eager:
                attach.EAGER.set(forward, True)
            if change is not None:
                change(forward)
            return self.runner.forward(forward).logits_output.next_token_logits, forward

    def slots(self, req: Req, tokens: int) -> torch.Tensor:
        """int64: the slots of its first ``tokens`` tokens."""
        return self.rows.req_to_token[req.kv.req_pool_idx, :tokens].to(torch.int64)

    def checkpoint(self, req: Req) -> None:
        """A piece is done, and more of the prompt follows."""
        from sglang.srt.mem_cache.common import checkpoint_kv_cache

        checkpoint_kv_cache(req, self.tree)

    def release(self, req: Req, keep: bool = False) -> None:
        from sglang.srt.mem_cache.common import release_kv_cache

        release_kv_cache(req, self.tree, checkpoint=keep)

    def abandon(self, reqs: Sequence[Req]) -> None:
        """Give back what the requests hold, wherever they are."""
        for req in reqs:
            if req.kv.holds_kv:
                self.release(req)
