"""One engine, its reference and its prompts: what every check gets, and how checks are run."""

from __future__ import annotations

import functools
import json
import math
import os
import shutil
import time
import traceback
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from model_support import latent, stand_ins
from model_support.architectures import PUBLISHED as WIDELY_PUBLISHED
from model_support.architectures import READ_AS, WIDE
from model_support.asks import Ask, Outcome
from model_support.engine import Engine
from model_support.prompts import Desk
from model_support.reference import Blended, Kv, Reference, RefPiece, highest
from model_support.routing import Routers
from model_support.whole_reference import WholeReference
from sgl_blend.harness.models import ARCHITECTURES, make_model
from sgl_blend.prefill import passes as prefill

#: architectures beside those of ``harness.models``
ARCHITECTURES.setdefault(
    "gemma3-scaled",
    (
        "Gemma3TextConfig",
        {
            "_kv_heads": 2,
            "head_dim": 32,
            "sliding_window": 64,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            },
        },
    ),
)
ARCHITECTURES.setdefault("gpt2", ("GPT2Config", {}))
ARCHITECTURES.setdefault(
    "gpt-oss",
    (
        "GptOssConfig",
        {"_kv_heads": 2, "head_dim": 32, "num_local_experts": 4, "num_experts_per_tok": 2}
        | {"sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"] * 2}
        | {
            "_rope": {"rope_type": "yarn", "factor": 4.0, "truncate": False}
            | {"original_max_position_embeddings": 4096}
        },
    ),
)
#: Gemma 2: keys that published checkpoints carry, SGLang reads, and transformers no longer
#: writes. The cap on the logits is left out: SGLang 0.5.23 has it as a GPU kernel only.
PUBLISHED = {
    "gemma2": {
        "hidden_act": "gelu_pytorch_tanh",
        "rope_theta": 10000.0,
        "final_logit_softcapping": None,
    }
}
ARCHITECTURES.update(latent.ARCHITECTURES)
PUBLISHED |= latent.PUBLISHED
ARCHITECTURES.update(WIDE)
PUBLISHED |= WIDELY_PUBLISHED
SIZE = {"layers": 4, "hidden": 64, "heads": 4, "vocab": 512}

#: name -> check; filled by the ``@check`` functions of the ``checks_*`` modules
CHECKS: dict[str, Callable[[World], dict[str, Any]]] = {}


def check(function: Callable[[World], dict[str, Any]]) -> Callable[[World], dict[str, Any]]:
    CHECKS[function.__name__] = function
    return function


class World:
    """``library``: prompts whose exact KV the tree holds after ``stock``: each document once,
    except the first, which lies there twice at different positions. ``model``: the reference's.
    ``more``: what each request says besides (``Ask.more``)."""

    def __init__(self, engine: Engine, model: Path, more: dict[str, Any] | None = None) -> None:
        self.engine = engine
        self.model = model
        self.more = more or {}
        self.desk = Desk()
        self.library = [self.desk.prompt(order, head)[0] for order, head in LIBRARY]
        self._reference: Reference | WholeReference | None = None
        self._full: dict[tuple[int, ...], Any] = {}

    @property
    def reference(self) -> Reference | WholeReference:
        if self._reference is None:
            name = self.model.name
            if name in WIDE:
                self._reference = WholeReference(self.model, **READ_AS.get(name, {}))
            else:
                kind = latent.LatentReference if name in latent.ARCHITECTURES else Reference
                self._reference = kind(self.model)
        return self._reference

    @functools.cached_property
    def routers(self) -> Routers:
        """Of the reference, in what it has computed for the last ``blended_reference``."""
        return Routers(self.reference.hf)

    def stock(self) -> None:
        """Empty the tree, then prefill the library."""
        self.engine.flush()
        for tokens in self.library:
            self.engine.run(Ask(tokens, blend=False, more=self.more))

    def full(self, tokens: list[int], new_tokens: int = 1) -> Outcome:
        """Plain full prefill of ``tokens`` on an empty tree (kept; empties the tree)."""
        key = (new_tokens, *tokens)
        if key not in self._full:
            ask = Ask(tokens, new_tokens=new_tokens, more=self.more)
            [self._full[key]] = self.engine.exact(ask)
        return self._full[key]

    def reference_full(self, tokens: list[int]) -> Kv:
        key = (-1, *tokens)
        if key not in self._full:
            self._full[key] = self.reference.full(tokens)
        return self._full[key]

    def blended_reference(self, ask: Ask, ours: Outcome, chosen: Chosen) -> Blended:
        """What the reference makes of the plan that ``ours`` ran by. The sources are looked up
        by their tokens in the library; choices are the reference's own (``random``: ours)."""
        self.routers.closest = math.inf
        plans = []
        at = ours.prefix
        self._reused: set[int] = set()
        for piece, end in zip(ours.pieces, ours.ends, strict=True):
            plans.append(self._ref_piece(ask, piece, at, end, chosen))
            self._reused |= set(plans[-1].reused.tolist())
            at = end
        head = None
        if ours.prefix:
            head = self.reference.head_of(self.reference_full(ask.tokens))
        return self.reference.blend(ask.tokens, plans, self.engine.config.check_layers, head)

    def _ref_piece(
        self, ask: Ask, piece: prefill.Piece | None, begin: int, end: int, chosen: Chosen
    ) -> RefPiece:
        depth = self.engine.layers
        blend = None if piece is None else piece.blend
        if blend is None:
            none = torch.zeros(0, dtype=torch.int64)
            return RefPiece(begin, end, none, [none] * depth, [none] * depth, "none", none)
        plan = blend.plan
        assert (plan.begin, plan.end) == (piece.begin, piece.begin + piece.rows) == (begin, end)
        raw: list[list[torch.Tensor]] = [[] for _ in range(depth)]
        values: list[list[torch.Tensor]] = [[] for _ in range(depth)]
        for span in plan.spans:
            source = self._source(ask.tokens, span)
            part = slice(span.source_start, span.source_start + span.length)
            for layer in range(depth):
                raw[layer].append(source.raw[layer][part])
                values[layer].append(source.v[layer][part])
        reused = torch.cat([torch.arange(s.start, s.end) for s in plan.spans])
        n, name = reused.numel(), plan.policy
        config = self.engine.config

        def way(name: str) -> Any:
            said = getattr(ask, name)
            return getattr(config, name) if said is None else said

        least = budget(n, config.min_ratio)
        certain = least if ask.coverage else budget(n, plan.ratio)
        # A document that an earlier piece has begun has no head here.
        begun = plan.spans[0].start == begin and begin - 1 in self._reused
        tops = heads(plan.spans, way("head_tokens"), begun)
        evenly = anchors(plan.spans, certain, way("anchor_share"), tops)
        documents = [torch.arange(s.start, s.end) for s in plan.spans]
        fixed = None
        if name == "random":
            fixed = chosen.of(piece)[-1]
        elif name == "leading":
            fixed = leading(plan.spans, budget(n, plan.ratio), evenly)
        elif name == "none":
            fixed = reused[:0]
        elif name == "stored":
            cover = (ask.coverage, least) if ask.coverage else None
            score = torch.cat([self._stored(ask.tokens, span) for span in plan.spans])
            fixed = highest(reused, score, budget(n, plan.ratio), cover, evenly)
        multipliers = self.engine.config.multipliers() if name == "hkvd" else (1.0,)
        return RefPiece(
            begin,
            end,
            reused,
            [torch.cat(r) for r in raw],
            [torch.cat(v) for v in values],
            name,
            fixed,
            [budget(n, min(1.0, plan.ratio * m)) for m in multipliers],
            torch.arange(plan.suffix_start, len(ask.tokens)),
            self.engine.config.query_smoothing,
            (ask.coverage, least) if ask.coverage else None,
            evenly,
            documents,
            way("correction"),
            way("query_values"),
            heads(plan.spans, max(4, way("head_tokens")), begun),
            head_counts(plan.spans, begun),
            round(way("query_head_share") * budget(n, plan.ratio)),
        )

    def _stored(self, tokens: list[int], span: Any) -> torch.Tensor:
        """The reference's scores of a span's tokens, at their source."""
        source = self._source_prompt(tokens, span)
        layer = self.engine.scores.layer
        key = (-3, *source)
        if key not in self._full:
            starts = self.engine.tree.cuts(source)[:-1].tolist()
            self._full[key] = self.reference.outward(source, starts, layer)
        return self._full[key][span.source_start : span.source_start + span.length]

    def _source(self, tokens: list[int], span: Any) -> Kv:
        return self.reference_full(self._source_prompt(tokens, span))

    def _source_prompt(self, tokens: list[int], span: Any) -> list[int]:
        """The library's prompt that holds a span's source."""
        a, b = span.source_start, span.source_start + span.length
        here = tokens[span.start : span.end]
        found = {tuple(t[:b]): t for t in self.library if t[a:b] == here}
        assert len(found) == 1, f"{len(found)} prompts hold the source of {span.start}:{span.end}"
        return next(iter(found.values()))


#: (documents, length of fresh text before them) of each prompt in the library
LIBRARY = (((0, 1), 25), ((2, 3), 0), ((4, 0, 5), 11))


def budget(count: int, ratio: float) -> int:
    """ceil(ratio * count), said once more."""
    whole = round(ratio * count, 6)
    return min(count, int(whole) + (whole > int(whole)))


def leading(spans: Any, total: int, before: torch.Tensor | None = None) -> torch.Tensor:
    """The ``total`` reused positions with the smallest relative depth in their span, behind those
    that go ``before`` them."""
    by_depth = sorted(((i / s.length), s.start + i) for s in spans for i in range(s.length))
    first = [] if before is None else before.tolist()
    order = first + [p for _, p in by_depth if p not in first]
    return torch.tensor(sorted(order[:total]), dtype=torch.int64)


def heads(spans: Any, first: int, begun: bool) -> list[int]:
    """The positions of each span's ``first`` tokens, the heads' first ones first; without the first
    span's where it was ``begun`` before."""
    mine = spans[1:] if begun else spans
    return [s.start + i for i in range(first) for s in mine if i < s.length]


def head_counts(spans: Any, begun: bool) -> dict[int, float]:
    """By how much more attention counts to a position near its span's beginning: 31 times, the 30
    of which fall e-fold every 8 tokens. Without the first span's where it was ``begun`` before."""
    mine = spans[1:] if begun else spans
    return {s.start + i: 1 + 30 * math.e ** (-i / 8) for s in mine for i in range(s.length)}


def anchors(spans: Any, total: int, share: float, tops: list[int]) -> torch.Tensor:
    """``tops``, up to half of ``total``, and evenly spaced positions: ``share`` of ``total``, one a
    span where that is no more than half of them; the rest by length."""
    tops = tops[: total // 2]
    if not share:
        return torch.tensor(tops, dtype=torch.int64)
    count = min(total, max(round(share * total), min(len(spans), total // 2)), total - len(tops))
    least = 1 if count >= len(spans) else 0
    left = count - least * len(spans)
    shares = [left * s.length / sum(t.length for t in spans) for s in spans]
    each = [least + int(x) for x in shares]
    by_rest = sorted(
        range(len(spans)), key=lambda i: (int(shares[i]) - shares[i], -spans[i].length)
    )
    for i in by_rest[: count - sum(each)]:
        each[i] += 1
    out = set(tops)
    for s, k in zip(spans, each, strict=True):
        k = min(k, s.length)
        out |= {s.start + (2 * i + 1) * s.length // (2 * k) for i in range(k)}
    return torch.tensor(sorted(out), dtype=torch.int64)


class Chosen:
    """The recomputed positions of each piece, as the prefill set them, one entry a filter."""

    def __init__(self) -> None:
        self._of: dict[int, list[torch.Tensor]] = {}

    def add(self, blend: Any, index: torch.Tensor) -> None:
        self._of.setdefault(id(blend), []).append(blend.tokens.positions[index.cpu()])

    def of(self, piece: prefill.Piece) -> list[torch.Tensor]:
        return self._of[id(piece.blend)]


@contextmanager
def watch():
    """Yields a :class:`Chosen` that the prefills inside fill."""
    chosen = Chosen()
    compute = prefill.BlendPass._compute

    def watched(self, alive):
        chosen.add(self.blend, alive)
        return compute(self, alive)

    with mock.patch.object(prefill.BlendPass, "_compute", watched):
        yield chosen


def must_fail(what: str, run: Callable[[], Any]) -> None:
    """A negative control: ``run`` has to raise AssertionError under the fault it is given."""
    try:
        run()
    except AssertionError:
        return
    raise RuntimeError(f"the check passes although {what}: it proves nothing")


def run_checks(
    models: str, arch: str, names: list[str], engine_options: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    """In a child: build the engine for ``arch`` and run the checks. Per check: figures, or the
    error's traceback."""
    from model_support import (  # noqa: F401
        checks_blend,
        checks_brief,
        checks_corrected,
        checks_exact,
        checks_fp8,
        checks_fused,
        checks_gate,
        checks_hkvd,
        checks_latent,
        checks_random,
        checks_reuse,
        checks_risk,
        checks_rotation,
        checks_size,
        checks_special,
        checks_stored,
    )

    model = model_for(Path(models), arch)
    stand_ins.install(arch)
    world = World(Engine(model, **engine_options), model)
    out = {}
    for name in names:
        try:
            start = time.perf_counter()
            out[name] = {"error": None, "figures": CHECKS[name](world) or {}}
            out[name]["seconds"] = round(time.perf_counter() - start, 2)
        except Exception:
            out[name] = {"error": traceback.format_exc(), "figures": {}}
    return out


def model_for(models: Path, arch: str) -> Path:
    """The random-weight model of ``arch``, made at first use."""
    path = models / arch
    if not (path / "config.json").exists():
        # Ranks start side by side: make it elsewhere, then move it into place.
        made = make_model(models / f".{arch}-{os.getpid()}", arch, **SIZE)
        config = json.loads((made / "config.json").read_text())
        config.update(PUBLISHED.get(arch, {}))
        (made / "config.json").write_text(json.dumps(config))
        latent.rename_weights(made, arch)
        try:
            made.rename(path)
        except OSError:
            shutil.rmtree(made)
    return path
