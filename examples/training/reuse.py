"""What full KV reuse does to a model, measured on ``transformers``' Llama. No server.

A document's KV is computed elsewhere, its K rotated by the difference of positions, and put into
the prompt. Then chosen rows (tokens) run through all layers; each writes its fresh K and V over
the cached one, and sees exactly the keys at its own and smaller positions. With all rows chosen
this is full prefill. Rows are chosen at random, or by the question's attention: its rows run
first, over the cached KV, and the tokens that they look at most are recomputed.

Elsewhere is one of two places: ``alone``, behind BOS and the system prompt; ``other``, in the
same documents' prompt with the records before the legends.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sgl_blend.config import BlendConfig
from sgl_blend.eval import tasks
from sgl_blend.eval.tasks import Case, Question
from sgl_blend.prefill.passes import query_depth, question_weights

from .model import rotate

Place = Literal["alone", "other"]
Choice = Literal["random", "query"]


class KV(NamedTuple):
    """Keys (rotated) and values of consecutive tokens: [layers, kv_heads, tokens, head_dim]."""

    k: Tensor
    v: Tensor


class Span(NamedTuple):
    """Tokens [start, end) of a prompt."""

    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Layout:
    """A prompt's tokens, int64 [n], and where each document lies. ``head``: BOS and system."""

    ids: Tensor
    head: int
    documents: tuple[Span, ...]

    @property
    def suffix(self) -> int:
        """Position of the first token after the last document."""
        return self.documents[-1].end


class Subject:
    """A Hugging Face Llama and its tokenizer, loaded from ``folder`` in fp32."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def encode(self, text: str, bos: bool = False) -> list[int]:
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return [self.tokenizer.bos_token_id, *ids] if bos else ids

    def layout(self, case: Case, tail: str) -> Layout:
        """The case's documents, then ``tail`` (questions)."""
        ids = self.encode(case.system, bos=True)
        head, spans = len(ids), []
        for document in case.documents:
            tokens = self.encode(document)
            spans.append(Span(len(ids), len(ids) + len(tokens)))
            ids += tokens
        return Layout(torch.tensor(ids + self.encode(tail)), head, tuple(spans))

    @torch.no_grad()
    def prefill(self, ids: Tensor) -> tuple[Tensor, KV]:
        """``transformers``' own forward. Logits of all positions [n, vocab], and the KV."""
        out = self.model(ids[None], use_cache=True)
        layers = out.past_key_values.layers
        k = torch.stack([layer.keys[0] for layer in layers])
        v = torch.stack([layer.values[0] for layer in layers])
        return out.logits[0], KV(k, v)

    @torch.no_grad()
    def answer(self, prompt: str, most: int = 8) -> str:
        """Greedy text up to the end token; ``prompt`` is without BOS."""
        ids = torch.tensor([self.encode(prompt, bos=True)])
        out = self.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=most, do_sample=False
        )
        return self.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip()

    def tables(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin, [n, head_dim], for (possibly negative) positions."""
        cos, sin = self.model.model.rotary_emb(torch.zeros(1), positions[None])
        return cos[0], sin[0]

    def elsewhere(self, case: Case, layout: Layout, place: Place) -> KV:
        """KV up to the suffix, the documents' part computed at ``place``; the head is exact."""
        head = layout.ids[: layout.head]
        _, kv = self.prefill(head)
        shape = (*kv.k.shape[:2], layout.suffix, kv.k.shape[3])
        out = KV(torch.zeros(shape), torch.zeros(shape))
        out.k[:, :, : layout.head], out.v[:, :, : layout.head] = kv
        order = range(len(layout.documents))
        if place == "alone":
            groups = [[d] for d in order]
        else:
            groups = [sorted(order, key=lambda d: case.documents[d].startswith("Legend"))]
        for group in groups:
            pieces = [
                layout.ids[layout.documents[d].start : layout.documents[d].end] for d in group
            ]
            _, kv = self.prefill(torch.cat([head, *pieces]))
            source = layout.head
            for d, piece in zip(group, pieces, strict=True):
                span, end = layout.documents[d], source + len(piece)
                cos, sin = self.tables(torch.full((len(piece),), span.start - source))
                out.k[:, :, span.start : span.end] = rotate(kv.k[:, :, source:end], cos, sin)
                out.v[:, :, span.start : span.end] = kv.v[:, :, source:end]
                source = end
        return out

    @torch.no_grad()
    def recompute(self, ids: Tensor, cached: KV, rows: Tensor) -> Tensor:
        """Run ``rows`` (sorted positions, int64 [r]) through all layers over ``cached``.

        ``rows`` must hold every position that ``cached`` does not reach. Returns the rows' logits
        [r, vocab]; ``cached`` is left as it is.
        """
        x, _ = self._run(ids, cached, rows, self.layers)
        return self.model.lm_head(self.model.model.norm(x))

    @torch.no_grad()
    def asked(self, ids: Tensor, cached: KV, rows: Tensor) -> Tensor:
        """How much the question looks at each token, fp32 [n], by sgl-blend's default rule.

        ``rows`` are the question's; they run over ``cached`` through the first layers, and their
        attention is summed over layers and heads, the last rows weighing most.
        """
        _, mass = self._run(ids, cached, rows, query_depth(self.layers, BlendConfig()))
        return question_weights(len(rows)) @ mass

    @property
    def layers(self) -> int:
        return self.model.config.num_hidden_layers

    @contextmanager
    def without(self, layer: int) -> Iterator[None]:
        """Inside, ``layer`` is the identity."""
        parts = self.model.model.layers[layer]
        weights = (parts.self_attn.o_proj.weight, parts.mlp.down_proj.weight)
        kept = [w.detach().clone() for w in weights]
        with torch.no_grad():
            for w in weights:
                w.zero_()
            try:
                yield
            finally:
                for w, old in zip(weights, kept, strict=True):
                    w.copy_(old)

    def _run(self, ids: Tensor, cached: KV, rows: Tensor, depth: int) -> tuple[Tensor, Tensor]:
        """Hidden states [r, hidden] of ``rows`` after ``depth`` layers, and their attention to
        each token, summed over those layers and all heads [r, n]."""
        body = self.model.model
        x = body.embed_tokens(ids[rows])
        cos, sin = self.tables(rows)
        hidden_keys = torch.arange(len(ids))[None] > rows[:, None]
        mass = torch.zeros(len(rows), len(ids))
        for i, layer in enumerate(body.layers[:depth]):
            attention = layer.self_attn
            hidden = layer.input_layernorm(x)
            dim = attention.head_dim

            def heads(projection, hidden=hidden, dim=dim) -> Tensor:
                return projection(hidden).view(len(hidden), -1, dim).transpose(0, 1)

            beyond = (0, 0, 0, len(ids) - cached.k.shape[2])
            k, v = F.pad(cached.k[i], beyond), F.pad(cached.v[i], beyond)
            k[:, rows] = rotate(heads(attention.k_proj), cos, sin)
            v[:, rows] = heads(attention.v_proj)
            q = rotate(heads(attention.q_proj), cos, sin)
            group = q.shape[0] // k.shape[0]
            scores = q @ k.repeat_interleave(group, 0).mT * dim**-0.5
            seen = scores.masked_fill(hidden_keys, -torch.inf).softmax(-1)
            mass += seen.sum(0)
            out = seen @ v.repeat_interleave(group, 0)
            x = x + attention.o_proj(out.transpose(0, 1).reshape(len(rows), -1))
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        return x, mass


class Score(NamedTuple):
    """Right answers of ``asked``, as fractions, by kind of question."""

    local: float
    dependent: float
    asked: int


class Tally:
    """Counts right answers by kind."""

    def __init__(self) -> None:
        self.counts = {"local": [0, 0], "dependent": [0, 0]}

    def add(self, kind: str, right: bool) -> None:
        self.counts[kind][0] += right
        self.counts[kind][1] += 1

    def score(self) -> Score:
        rate = {k: right / max(1, n) for k, (right, n) in self.counts.items()}
        return Score(rate["local"], rate["dependent"], sum(n for _, n in self.counts.values()))


def reuse_scores(
    subject: Subject,
    cases: Sequence[Case],
    place: Place,
    ratios: Sequence[float],
    choice: Choice = "random",
    seed: int = 0,
) -> dict[float, Score]:
    """First-token accuracy for each share of document tokens that is recomputed.

    Each question is asked alone. 0 is full reuse, 1 recomputes all; the question's own tokens
    are always computed.
    """
    rng = random.Random(seed)
    tallies = {ratio: Tally() for ratio in ratios}
    for case in cases:
        cached = subject.elsewhere(case, subject.layout(case, ""), place)
        for question in case.questions:
            layout = subject.layout(case, tasks.ask([question]))
            documents = range(layout.head, layout.suffix)
            suffix = list(range(layout.suffix, len(layout.ids)))
            if choice == "query":
                mass = subject.asked(layout.ids, cached, torch.tensor(suffix))
                ranked = (mass[layout.head : layout.suffix].argsort(descending=True)) + layout.head
            for ratio, tally in tallies.items():
                budget = round(ratio * len(documents))
                if choice == "query":
                    chosen = ranked[:budget].tolist()
                else:
                    chosen = rng.sample(documents, budget)
                rows = torch.tensor(sorted(chosen) + suffix)
                word = subject.recompute(layout.ids, cached, rows)[-1].argmax()
                tally.add(question.kind, _is(subject, word, question))
    return {ratio: tally.score() for ratio, tally in tallies.items()}


def exact_scores(subject: Subject, cases: Sequence[Case]) -> Score:
    """First-token accuracy of full prefill, each question asked alone.

    The documents are prefilled once a case; the question's rows run over their exact KV.
    """
    tally = Tally()
    for case in cases:
        _, exact = subject.prefill(subject.layout(case, "").ids)
        for question in case.questions:
            layout = subject.layout(case, tasks.ask([question]))
            rows = torch.arange(layout.suffix, len(layout.ids))
            word = subject.recompute(layout.ids, exact, rows)[-1].argmax()
            tally.add(question.kind, _is(subject, word, question))
    return tally.score()


def follow_up_scores(subject: Subject, cases: Sequence[Case]) -> Score:
    """Full prefill's accuracy on each case's questions asked one after the other in one prompt."""
    tally = Tally()
    for case in cases:
        tail = "\n".join(f"{tasks.ask([q])} {q.answer}{tasks.END}" for q in case.questions)
        layout = subject.layout(case, tail)
        logits, _ = subject.prefill(layout.ids)
        end = subject.tokenizer.eos_token_id
        ends = (layout.ids == end).nonzero().squeeze(1)
        for question, at in zip(case.questions, ends.tolist(), strict=True):
            tally.add(question.kind, _is(subject, logits[at - 2].argmax(), question))
    return tally.score()


def joint_score(subject: Subject, cases: Sequence[Case]) -> float:
    """Share of exact greedy answers to joint questions; each case's questions two by two.

    Greedy decoding says exactly the true answer if and only if each of its tokens, the end token
    too, is the likeliest after those before; so one pass over the true answer tells.
    """
    right = asked = 0
    for case in cases:
        _, exact = subject.prefill(subject.layout(case, "").ids)
        for i in range(0, len(case.questions) - 1, 2):
            two = case.questions[i : i + 2]
            said = f"{tasks.expected(two)}{tasks.END}"
            layout = subject.layout(case, f"{tasks.ask(two)} {said}")
            rows = torch.arange(layout.suffix, len(layout.ids))
            best = subject.recompute(layout.ids, exact, rows).argmax(-1)
            length = len(subject.encode(said))
            right += torch.equal(best[-length - 1 : -1], layout.ids[-length:])
            asked += 1
    return right / asked


def talk_score(subject: Subject, talks: Sequence[tasks.Conversation]) -> float:
    """Share of turns answered exactly, as for :func:`joint_score`, over the true history."""
    right = asked = 0
    for talk in talks:
        last = len(talk.turns) - 1
        whole = f"{talk.prompt(last)}{talk.turns[last].answer}{tasks.END}"
        ids = torch.tensor(subject.encode(whole, bos=True))
        logits, _ = subject.prefill(ids)
        best = logits.argmax(-1)
        for turn in range(last + 1):
            start = len(subject.encode(talk.prompt(turn), bos=True))
            end = start + len(subject.encode(f"{talk.turns[turn].answer}{tasks.END}"))
            right += torch.equal(best[start - 1 : end - 1], ids[start:end])
            asked += 1
    return right / asked


def _is(subject: Subject, word: Tensor, question: Question) -> bool:
    return subject.tokenizer.decode([int(word)]).strip() == question.answer
