"""Blend prefill over any Hugging Face model, by substitution instead of pruning.

``reference.py`` knows a decoder layer's parts; here the model runs as transformers wrote it, over
the whole prompt, with every row in every layer. What is reused is put in where it enters: the
rows of a copied token get, as input of a layer's attention, what that attention was given when the
token's source was computed. Its projections, norms and rotation then make from it the K at the new
position and the V that our copies must equal, whatever they are (partial rotations, layers without
positions, norms of keys, several ropes). What becomes of such a row behind the attention is never
read: its K and V are substituted again in the next layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from model_support.reference import Blended, Kv, RefPiece, highest, question_mass, spread

INTERFACE = "sgl_blend_reference"


class WholeReference:
    """``model``: a folder that transformers loads. ``raw`` of its :class:`Kv`: what each layer's
    attention was given, [tokens, hidden]."""

    def __init__(self, model: Path, **changed: Any) -> None:
        """changed: values in place of the model's configuration."""
        from transformers import AttentionInterface, AutoModelForCausalLM

        self.hf = AutoModelForCausalLM.from_pretrained(
            model, dtype=torch.float32, attn_implementation="eager", **changed
        ).eval()
        layers = [m for m in self.hf.modules() if hasattr(m, "layer_idx") and hasattr(m, "scaling")]
        self.depth = self.hf.config.num_hidden_layers
        assert sorted(m.layer_idx for m in layers) == list(range(self.depth))
        for module in layers:
            module.register_forward_pre_hook(self._given, with_kwargs=True)
        AttentionInterface.register(INTERFACE, lambda *a, **kw: self._attend(*a, **kw))
        self._pass: _Pass | None = None

    # -- what transformers calls ---------------------------------------------------------

    def _given(self, module: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        if self._pass is None:
            return None
        layer = module.layer_idx
        x = args[0] if args else kwargs["hidden_states"]
        for rows, given in self._pass.given(layer):
            x = x.clone()
            x[0, rows] = given
        self._pass.inputs.append(x[0])
        return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": x})

    def _attend(
        self,
        module: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        attention_mask: None,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        s_aux: torch.Tensor | None = None,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        """q, k, v [1, heads, tokens, dim], rotated -> [1, tokens, heads, dim]."""
        assert attention_mask is None and softcap is None, "not done here"
        now = self._pass
        now.k.append(k[0].transpose(0, 1))
        now.v.append(v[0].transpose(0, 1))
        group = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        scores = q[0] @ k[0].mT * (q.shape[-1] ** -0.5 if scaling is None else scaling)
        pos = torch.arange(q.shape[2])
        hidden = (pos[None, :] > pos[:, None]) | now.unseen[None, :]
        if sliding_window:
            hidden |= pos[None, :] <= pos[:, None] - sliding_window
        scores = scores.masked_fill(hidden, -math.inf)
        if s_aux is not None:
            scores = torch.cat([scores, s_aux[:, None, None].expand(-1, len(pos), 1)], dim=-1)
        probs = scores.softmax(dim=-1)[..., : len(pos)].nan_to_num(0.0)
        now.attended(module.layer_idx, probs)
        return (probs @ v[0]).transpose(0, 1)[None].contiguous(), None

    @contextmanager
    def _running(self, now: _Pass) -> Iterator[None]:
        self._pass = now
        self.hf.set_attn_implementation(INTERFACE)
        try:
            yield
        finally:
            self.hf.set_attn_implementation("eager")
            self._pass = None

    def _run(self, ids: torch.Tensor, now: _Pass) -> torch.Tensor:
        """Logits of the last row; ``now`` keeps what the layers made."""
        with self._running(now):
            return self.hf(ids[None], use_cache=False).logits[0, -1]

    # -- prefills ------------------------------------------------------------------------

    @torch.no_grad()
    def full(self, tokens: Sequence[int]) -> Kv:
        now = _Pass(len(tokens))
        logits = self._run(torch.tensor(tokens), now)
        return Kv(now.inputs, now.v, logits)

    def head_of(self, full: Kv) -> None:
        """Rows before the first piece run along and are exact."""

    @torch.no_grad()
    def blend(
        self,
        tokens: Sequence[int],
        pieces: Sequence[RefPiece],
        check_layers: Sequence[int],
        head: None = None,
    ) -> Blended:
        ids = torch.tensor(tokens)
        settled: list[_Copied] = []
        exact = True
        for p in pieces:
            if p.policy == "query" and p.reused.numel():
                one = _Copied(p, self._ask(ids, p, settled, exact))
            else:
                one = _Copied(p, p.reused if p.policy == "hkvd" else p.fixed)
            settled.append(one)
            exact = exact and not p.reused.numel()
        now = _Pass(len(tokens), settled)
        checking = [c for c in settled if c.piece.policy == "hkvd" and c.piece.reused.numel()]
        if checking:
            now.then = lambda layer: _check(checking, check_layers, layer, now.v[layer])
        logits = self._run(ids, now)
        return Blended(now.k, now.v, logits, [c.picked for c in settled])

    def _ask(
        self, ids: torch.Tensor, p: RefPiece, settled: list[_Copied], exact: bool
    ) -> torch.Tensor:
        """The question's rows see the prefix, the reused tokens and themselves, and what stands
        before the first reused token while that is exact."""
        lead = torch.arange(p.begin, int(p.reused[0]) if exact else p.begin)
        nothing = p.reused[:0]
        now = _Pass(len(ids), [*settled, _Copied(p, nothing)])
        now.unseen[p.begin :] = True
        now.unseen[torch.cat([lead, p.reused, p.question])] = False
        mass = torch.zeros(p.reused.numel())

        def add(layer: int, probs: torch.Tensor) -> None:
            if layer < self.depth - 1:
                mass.add_(question_mass(probs[:, p.question])[p.reused])

        now.probs = add
        self._run(ids, now)
        return highest(p.reused, spread(p, mass), p.budgets[0], p.cover)


class _Copied:
    """A piece whose reused tokens but ``picked`` are copied, in layers from ``first`` on."""

    def __init__(self, piece: RefPiece, picked: torch.Tensor) -> None:
        self.piece = piece
        self.picked = picked

    def given(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        copied = ~torch.isin(self.piece.reused, self.picked)
        return self.piece.reused[copied], self.piece.raw[layer][copied]


class _Pass:
    """One run of the model. unseen: keys that no row sees."""

    def __init__(self, tokens: int, pieces: Sequence[_Copied] = ()) -> None:
        self.inputs: list[torch.Tensor] = []
        self.k: list[torch.Tensor] = []
        self.v: list[torch.Tensor] = []
        self.unseen = torch.zeros(tokens, dtype=torch.bool)
        self.probs: Callable[[int, torch.Tensor], None] | None = None
        self.then: Callable[[int], None] | None = None
        self._pieces = pieces

    def given(self, layer: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        pairs = [p.given(layer) for p in self._pieces if p.piece.reused.numel()]
        return [(rows, x) for rows, x in pairs if rows.numel()]

    def attended(self, layer: int, probs: torch.Tensor) -> None:
        if self.probs is not None:
            self.probs(layer, probs)
        if self.then is not None:
            self.then(layer)


def _check(
    checking: Sequence[_Copied], check_layers: Sequence[int], layer: int, v: torch.Tensor
) -> None:
    """After a check layer those stay whose V is farthest from their source's."""
    if layer not in check_layers:
        return
    step = list(check_layers).index(layer)
    for one in checking:
        p = one.piece
        among = torch.isin(p.reused, one.picked)
        off = (v[one.picked] - p.v[layer][among]).square().flatten(1).sum(1)
        cover = p.cover if layer == check_layers[-1] else None
        one.picked = highest(one.picked, off, p.budgets[step], cover)
