"""Cases of attention of rows by true position for the CUDA kernels, against softmax in fp64 over
the same values."""

from __future__ import annotations

import math

import emulated
import pytest
import torch

from sgl_blend.ops import cuda_rows
from sgl_blend.ops.reference import visible

BF16, FP16 = torch.bfloat16, torch.float16
#: relative error of one rounding: of a probability before it meets its value, and of the output
ROUNDING = {BF16: 2**-8, FP16: 2**-11}
#: the step between fp16's smallest numbers
LEAST = 2**-24
MARGIN = 64


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Floating memory that is handed out empty is NaN, and stays so before and behind it."""
    empty, given = torch.empty, []

    def guarded(shape, *args, **kwargs):
        if not isinstance(shape, tuple) or not kwargs["dtype"].is_floating_point:
            return empty(shape, *args, **kwargs)
        numel = math.prod(shape)
        whole = empty(numel + 2 * MARGIN, *args, **kwargs).fill_(torch.nan)
        given.append(whole)
        return whole[MARGIN : MARGIN + numel].view(shape)

    monkeypatch.setattr(torch, "empty", guarded)
    yield
    for whole in given:
        assert whole[:MARGIN].isnan().all() and whole[-MARGIN:].isnan().all()


class Case:
    """Rows at ``positions`` of each of ``requests`` over so many keys, whose slots lie in no order.

    requests: (positions, keys) each. beside: keys outside the pool, of the only request, in any
    order: (positions, and where they lie within wider rows). latent: values are the first columns
    of their keys, in one buffer.
    """

    def __init__(
        self, *requests, heads=(4, 1), dim=64, value_dim=None, dtype=BF16, k_dtype=None,
        window=-1, cap=0.0, sinks=False, first_pos=0, key_pos=None, beside=(), latent=False,
    ):  # fmt: skip
        gen = torch.Generator().manual_seed(dim + len(requests))
        (q_heads, kv_heads), value_dim = heads, value_dim or dim
        self.rows, self.keys = [len(p) for p, _ in requests], [n for _, n in requests]
        self.positions = [torch.as_tensor(p, dtype=torch.int64) for p, _ in requests]
        # Rows of a projection to queries, keys and values together; what is beside them is poison.
        wide = torch.randn(sum(self.rows), 3 * q_heads * dim, generator=gen).to(dtype)
        wide[:, q_heads * dim :] = torch.nan
        self.q = wide[:, : q_heads * dim].unflatten(1, (q_heads, dim))
        total = sum(self.keys)
        # One slot before the first and one behind the last are poison.
        self.slots = torch.randperm(total + 7, generator=gen)[:total] + 1
        k, v = (torch.randn(total + 9, kv_heads, d, generator=gen) for d in (dim, value_dim))
        k[0] = k[-1] = v[0] = v[-1] = torch.nan
        self.k, self.v = k.to(k_dtype or dtype), v.to(k_dtype or dtype)
        self.beside = torch.tensor(beside, dtype=torch.int64)
        self.own = [
            torch.randn(len(beside), 3, kv_heads, d, generator=gen).to(k_dtype or dtype)[:, 1]
            for d in (dim, value_dim)
        ]
        if latent:
            self.v = self.k[..., :value_dim]
            self.own[1] = self.own[0][..., :value_dim]
        self.sinks = torch.randn(q_heads, generator=gen) * 3 if sinks else None
        self.how = dict(scale=dim**-0.5, window=window, logit_cap=cap)
        self.first_pos, self.key_pos = first_pos, key_pos
        self.group = q_heads // kv_heads

    def expected(self):
        """Output and log-sum-exp, fp64, and how long a row's values are on average."""
        made, row, key = [], 0, 0
        for pos, n in zip(self.positions, self.keys, strict=True):
            at = torch.arange(n) + self.first_pos
            if self.key_pos is not None:
                at = self.key_pos[key : key + n]
            at = torch.cat((at, self.beside))
            mine = self.slots[key : key + n]
            k, v = (
                torch.cat((pool[mine].double(), own.double())).repeat_interleave(self.group, 1)
                for pool, own in zip((self.k, self.v), self.own, strict=True)
            )
            scores = torch.einsum("rhd,nhd->rhn", self.q[row : row + len(pos)].double(), k)
            scores, cap = scores * self.how["scale"], self.how["logit_cap"]
            if cap:
                scores = cap * torch.tanh(scores / cap)
            hidden = ~visible(pos, at, self.how["window"])[:, None]
            scores = scores.masked_fill(hidden, -math.inf)
            lse = scores.logsumexp(-1)
            if self.sinks is not None:
                lse = torch.logaddexp(lse, self.sinks.double())
            probs = torch.exp(scores - lse[..., None]).masked_fill(hidden, 0.0)
            made.append([torch.einsum("rhn,nhd->rhd", probs, x) for x in (v, v.abs())] + [lse])
            row, key = row + len(pos), key + n
        out, length, lse = (torch.cat(x) for x in zip(*made, strict=True))
        return out, length, lse

    def over(self):
        tiles = torch.from_numpy(cuda_rows.tiles_of(self.rows, self.keys, self.group))
        pool = cuda_rows.Keys(
            self.k, self.v, self.slots, tiles, max(self.keys), self.first_pos, self.key_pos
        )
        if not len(self.beside):
            return [pool]
        return [pool, cuda_rows.one_request(self.q, *self.own, None, 0, self.beside)]

    def check(self, module, parts=1, with_lse=True):
        over = self.over()
        assert sum(keys.parts for keys in over) == parts
        out, length, lse = self.expected()
        rounding, first = ROUNDING[self.q.dtype], None
        for way in emulated.schedules(module):
            got = cuda_rows.row_attention(
                module, self.q, torch.cat(self.positions), over,
                **self.how, sinks=self.sinks, with_lse=with_lse,
            )  # fmt: skip
            first = first or got
            assert torch.equal(got.out, first.out), f"other sums: {way}"
            off = (got.out.double() - out).abs()
            beyond = off - rounding * (length + out.abs()) - 1e-5 * length - LEAST
            assert bool((beyond <= 0).all()), f"{way}: {beyond.max():.2g} beyond rounding"
            if with_lse:
                torch.testing.assert_close(got.lse.double(), lse, rtol=1e-5, atol=1e-4, msg=way)
            else:
                assert got.lse is None


def gapped(first, last, n):
    """``n`` positions in first..last, with holes and repeats."""
    return torch.linspace(first, last, n).long().tolist()
