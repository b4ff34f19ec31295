"""FlashInfer's paged prefill without a GPU: its own ``plan``, and attention over what it planned,
in plain torch. Only the compiled modules are replaced. Needs: FlashInfer."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import flashinfer
import torch
from on_device import OnDevice, on_device, on_host

#: the module, which has the name of a function in it
packing = importlib.import_module("flashinfer.quantization.packbits")
REAL = flashinfer.BatchPrefillWithPagedKVCacheWrapper


class _Prefill:
    """The kernels' module. plan: what of its arguments is read on the host lies there."""

    @staticmethod
    def plan(*args: Any) -> list[int]:
        floats, ints, pinned, *host = args[:6]
        assert not any(isinstance(x, OnDevice) for x in (pinned, *host))
        return []


class _Packing:
    @staticmethod
    def packbits(x: torch.Tensor, order: str, out: torch.Tensor) -> None:
        assert order == "little"
        bits = torch.nn.functional.pad(on_host(x).to(torch.uint8), (0, -x.numel() % 8)).view(-1, 8)
        on_host(out).copy_((bits << torch.arange(8, dtype=torch.uint8)).sum(1, dtype=torch.uint8))

    @classmethod
    def segment_packbits(cls, x, indptr, packed, order, out) -> None:
        """One kernel for all segments."""
        of, to = on_host(indptr).tolist(), on_host(packed).tolist()
        for i in range(len(of) - 1):
            cls.packbits(on_host(x)[of[i] : of[i + 1]], order, on_host(out)[to[i] : to[i + 1]])


class Planned(REAL):
    """``run`` reads what ``plan`` has put on the device, as the kernels do. plans: so many."""

    plans = 0

    def plan(self, *args: Any, **kwargs: Any) -> None:
        Planned.plans += 1
        super().plan(*args, **kwargs)

    def run(self, q, paged_kv_cache, *, return_lse=False, lse_base="ln", k_scale=1.0, v_scale=1.0):
        assert lse_base == "ln"
        assert (self._cached_q_data_type, self._cached_kv_data_type) == (
            q.dtype,
            paged_kv_cache[0].dtype,
        )
        assert q.is_cuda and q.is_contiguous()
        at = [
            on_host(x).tolist()
            for x in (
                self._qo_indptr_buf,
                self._paged_kv_indptr_buf,
                self._paged_kv_last_page_len_buf,
            )
        ]
        assert self._qo_indptr_buf.is_cuda and set(at[2]) == {1}
        masked = self._custom_mask_buf is not None
        if masked:
            assert self._custom_mask_buf.is_cuda and self._mask_indptr_buf.is_cuda
            mask, begins = on_host(self._custom_mask_buf), on_host(self._mask_indptr_buf).tolist()
        pages = on_host(self._paged_kv_indices_buf).long()
        k_cache, v_cache = map(on_host, paged_kv_cache)
        group, out, sums = self._num_qo_heads // self._num_kv_heads, [], []
        for i in range(len(at[0]) - 1):
            rows = on_host(q)[at[0][i] : at[0][i + 1]].float()
            mine = pages[at[1][i] : at[1][i + 1]]
            k, v = (c[mine, 0].float().repeat_interleave(group, 1) for c in (k_cache, v_cache))
            seen = torch.ones(len(rows), len(mine), dtype=torch.bool)
            if masked:
                cells = torch.arange(len(rows) * len(mine))
                seen = mask[begins[i] + cells // 8] >> (cells % 8).to(torch.uint8) & 1
                seen = seen.bool().view(len(rows), len(mine))
            scores = torch.einsum("qhd,khd->hqk", rows, k) * self._sm_scale * k_scale
            if self._logits_soft_cap:
                scores = self._logits_soft_cap * torch.tanh(scores / self._logits_soft_cap)
            scores = scores.masked_fill(~seen, float("-inf"))
            sums.append(scores.logsumexp(-1).T)
            out.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v))
        got = on_device(torch.cat(out).to(q.dtype) * v_scale)
        return (got, on_device(torch.cat(sums))) if return_lse else got


@contextlib.contextmanager
def planning() -> Iterator[None]:
    """FlashInfer on the pretended device of ``on_device.watching``."""
    from sgl_blend.prefill import attention_cuda

    with contextlib.ExitStack() as stack:
        for target, name, value in (
            (flashinfer, "BatchPrefillWithPagedKVCacheWrapper", Planned),
            (flashinfer.prefill, "get_batch_prefill_module", lambda *args: _Prefill),
            (packing, "get_quantization_module", lambda: _Packing),
        ):
            stack.enter_context(mock.patch.object(target, name, value))
        attention_cuda._workspace.cache_clear()
        yield
        attention_cuda._workspace.cache_clear()
