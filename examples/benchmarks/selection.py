"""Ways to rank tokens for recomputation, compared in plain torch on a shipped model. No server.

    python examples/benchmarks/selection.py examples/models/blend-4l --cases 40

Documents were seen alone. The question's last 16 tokens run over their cached KV, as ``query``
does it; each way turns that attention into a score; the highest-scored tokens are recomputed with
the question and the true answer (teacher forcing), and the answer's logits compared with full
prefill's. Minutes on one core; what wins here is then measured through the server
(``sgl-blend eval``). Columns: answers right (all words of it), output positions with full
prefill's likeliest token, KL in nats a position.

``stored`` ways ask no question: they rank by how much of a token's attention left its document, or
its chunk, when the document was computed alone (mean over heads; one layer, or the first 3/4).
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from training.model import rotate  # noqa: E402
from training.reuse import KV, Layout, Subject  # noqa: E402

from sgl_blend.chunking import ChunkingConfig, cut_points, strong_table  # noqa: E402
from sgl_blend.eval import tasks  # noqa: E402
from sgl_blend.prefill.passes import question_weights  # noqa: E402
from sgl_blend.selection.query import spread  # noqa: E402

SUFFIX = 16
WAYS = ("one", "joint", "follow-up")


@dataclass
class Prompt:
    """ids: prompt and answer. end: where the answer begins. reused: positions of cached tokens
    behind the exact prefix. attention: fp32 [layers, heads, question rows, reused];
    values: norm of each reused token's V, [layers, heads, reused]. outward: by what it leaves, the
    share of each reused token's attention that did so, [layers, reused]."""

    ids: Tensor
    end: int
    cached: KV
    reused: Tensor
    exact: Tensor
    attention: Tensor
    values: Tensor
    outward: dict[str, Tensor]


@torch.no_grad()
def ask(model: Subject, ids: Tensor, cached: KV, prefix: int, reused: Tensor, rows: Tensor):
    """The question's pass: attention to the reused tokens, and the norms of their values."""
    body = model.model.model
    x = body.embed_tokens(ids[rows])
    cos, sin = model.tables(rows)
    keys = torch.cat([torch.arange(prefix), reused])
    hidden = torch.cat([keys, rows])[None] > rows[:, None]
    seen, norms = [], []
    for i, layer in enumerate(body.layers):
        attn = layer.self_attn
        normed = layer.input_layernorm(x)

        def heads(projection, normed=normed, dim=attn.head_dim) -> Tensor:
            return projection(normed).view(len(normed), -1, dim).transpose(0, 1)

        k = torch.cat([cached.k[i][:, keys], rotate(heads(attn.k_proj), cos, sin)], 1)
        v = torch.cat([cached.v[i][:, keys], heads(attn.v_proj)], 1)
        q = rotate(heads(attn.q_proj), cos, sin)
        group = q.shape[0] // k.shape[0]
        k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
        scores = (q @ k.mT * attn.head_dim**-0.5).masked_fill(hidden, -math.inf)
        probs = scores.softmax(-1)
        mine = slice(prefix, prefix + len(reused))
        seen.append(probs[:, :, mine])
        norms.append(v[:, mine].norm(dim=-1))
        x = x + attn.o_proj((probs @ v).transpose(0, 1).flatten(1))
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    return torch.stack(seen), torch.stack(norms)


@torch.no_grad()
def leaving(model: Subject, layout: Layout) -> dict[str, Tensor]:
    """Share of attention that leaves a token's document, and its chunk, in each document's own
    prefill behind the head; fp32 [layers, suffix], mean over heads."""
    head = layout.ids[: layout.head]
    strong = strong_table([model.tokenizer.bos_token_id])
    out = {what: torch.zeros(model.layers, layout.suffix) for what in ("document", "chunk")}
    for span in layout.documents:
        ids = torch.cat([head, layout.ids[span.start : span.end]])
        seen = model.model(ids[None], output_attentions=True).attentions
        mean = torch.stack(seen)[:, 0].mean(1)
        at = torch.arange(len(ids))
        chunks = torch.from_numpy(cut_points(ids.numpy(), ChunkingConfig(), strong)[:-1])
        starts = {
            "document": torch.full_like(at, layout.head),
            "chunk": chunks[torch.searchsorted(chunks, at, right=True) - 1],
        }
        for what, start in starts.items():
            share = (mean * (at[None] < start[:, None])).sum(-1)
            out[what][:, span.start : span.end] = share[:, layout.head :]
    return out


def prompts(model: Subject, way: str, seeds: range, shape: dict) -> Iterator[Prompt]:
    for seed in seeds:
        case = tasks.make_case(seed, n_questions=4, **shape)
        q = case.questions
        asked: list[tuple] = {
            "one": [((a,), ()) for a in q],
            "joint": [(q[:2], ()), (q[2:], ())],
            "follow-up": [(q[i : i + 1], q[:i]) for i in (1, 2, 3)],
        }[way]
        whole = model.elsewhere(case, model.layout(case, ""), "alone")
        outward = leaving(model, model.layout(case, ""))
        for what, before in asked:
            tail = "\n".join(
                [*(f"{b.text} {b.answer}{tasks.END}" for b in before), tasks.ask(what)]
            )
            layout = model.layout(case, tail)
            end = len(layout.ids)
            answer = torch.tensor(model.encode(tasks.expected(what) + tasks.END))
            ids = torch.cat([layout.ids, answer])
            prefix, last = layout.documents[0].end, min(layout.suffix, end - SUFFIX)
            cached = KV(whole.k[:, :, :last], whole.v[:, :, :last])
            reused = torch.arange(prefix, last)
            rows = torch.arange(end - SUFFIX, end)
            attention, values = ask(model, ids, cached, prefix, reused, rows)
            exact = model.prefill(ids)[0][end - 1 : -1]
            left = {what: share[:, reused] for what, share in outward.items()}
            yield Prompt(ids, end, cached, reused, exact, attention, values, left)


def scores(p: Prompt, depths: list[float]) -> Iterator[tuple[str, Tensor]]:
    """Each way's name and score, fp32 [reused]."""
    layers, _, rows, n = p.attention.shape
    mix = question_weights(rows)[:, None]
    last = torch.zeros(rows, 1)
    last[-1] = 1.0
    triangle: Callable[[Tensor, int], Tensor] = lambda s, r: spread(s, p.reused, r)  # noqa: E731
    yield "random", torch.rand(n)
    for what, share in p.outward.items():
        for layer in range(layers):
            yield f"stored, {what}, layer {layer}", share[layer]
        mean = share[: math.ceil(0.75 * layers)].mean(0)
        yield f"stored, {what}, mean", mean
        yield f"stored, {what}, mean, least first", -mean
    for depth in depths:
        seen = p.attention[: math.ceil(depth * layers)]
        values = p.values[: len(seen)]
        base = (seen * mix).sum((0, 1, 2))
        name = f"depth {depth:g}"
        yield f"{name}", base
        yield f"{name}, neighbours 1", triangle(base, 1)
        yield f"{name}, neighbours 2 (default)", triangle(base, 2)
        yield f"{name}, mean of 5", F.avg_pool1d(base[None, None], 5, 1, 2)[0, 0]
        yield f"{name}, times the norm of V", ((seen * mix).sum(2) * values).sum((0, 1))
        yield f"{name}, last row only", (seen * last).sum((0, 1, 2))
        yield f"{name}, all rows alike", seen.mean(2).sum((0, 1))
        yield f"{name}, highest head", (seen * mix).sum(2).amax(1).sum(0)
        yield f"{name}, highest layer", (seen * mix).sum((1, 2)).amax(0)
        yield f"{name}, its last layer only", (seen[-1] * mix).sum((0, 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--cases", type=int, default=20)
    parser.add_argument("--seed", type=int, default=700)
    parser.add_argument("--ratios", default="0.05,0.1")
    parser.add_argument("--depths", default="0.5,0.75,1")
    parser.add_argument("--n-docs", type=int, default=4)
    parser.add_argument("--n-legends", type=int, default=2)
    parser.add_argument("--doc-tokens", default="60,120")
    args = parser.parse_args()
    torch.manual_seed(0)
    ratios = [float(r) for r in args.ratios.split(",")]
    depths = [float(d) for d in args.depths.split(",")]
    low, high = map(int, args.doc_tokens.split(","))
    shape = {"n_docs": args.n_docs, "n_legends": args.n_legends, "doc_tokens": (low, high)}
    model = Subject(args.model)
    model.model.set_attn_implementation("eager")  # hands out its attention
    tallies: dict[str, dict[str, list[float]]] = {}
    for way in WAYS:
        for p in prompts(model, way, range(args.seed, args.seed + args.cases), shape):
            n = len(p.reused)
            chosen = {"full reuse": p.reused[:0], "all": p.reused}
            for name, score in scores(p, depths):
                for r in ratios:
                    best = score.topk(math.ceil(r * n)).indices.sort().values
                    chosen[f"{name} at {r:g}"] = p.reused[best]
            for name, rows in chosen.items():
                _tally(model, p, rows, tallies.setdefault(name, {}).setdefault(way, [0.0] * 5))
    print("| | " + " | ".join(WAYS) + " | top-1 | KL |\n|---|" + "---|" * (len(WAYS) + 2))
    for name, by_way in tallies.items():
        right = " | ".join(f"{100 * t[0] / t[1]:.1f}" for t in by_way.values())
        total = [sum(t[i] for t in by_way.values()) for i in (2, 3, 4)]
        print(f"| {name} | {right} | {100 * total[0] / total[1]:.2f} | {total[2] / total[1]:.4f} |")


def _tally(model: Subject, p: Prompt, rows: Tensor, t: list[float]) -> None:
    must = torch.arange(int(p.reused[-1]) + 1, len(p.ids))
    answer = p.ids[p.end :]
    logits = model.recompute(p.ids, p.cached, torch.cat([rows, must]))[-len(answer) - 1 : -1]
    want, got = p.exact.log_softmax(-1), logits.log_softmax(-1)
    t[0] += float((logits.argmax(-1) == answer)[:-1].all())
    t[1] += 1
    t[2] += float((logits.argmax(-1) == p.exact.argmax(-1)).sum())
    t[3] += len(answer)
    t[4] += float((want.exp() * (want - got)).sum())


if __name__ == "__main__":
    main()
