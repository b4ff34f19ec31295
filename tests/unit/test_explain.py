"""``sgl-blend explain``: the facts of a page from answers that are given to it, and the page. CPU;
a real server is in tests/server/test_tools_server.py."""

from __future__ import annotations

import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from sgl_blend.cli.explain import html
from sgl_blend.cli.explaining import Asked, histogram, page_of
from sgl_blend.cli.main import main
from sgl_blend.engine.request.detail import Detail
from sgl_blend.engine.request.options import parse_options
from sgl_blend.errors import ConfigError
from sgl_blend.harness.client import Answer, ServerError
from sgl_blend.plan import BlendPlan, ReuseSpan
from sgl_blend.prefill.pieces import Piece, PieceBlend, Told
from sgl_blend.selection import POLICIES, ReusedTokens

TEXTS = ("<s>", "A", " <b>", "river", "\n", " runs", " by", "Who", "?", "&", " z", "!")
#: two pieces: 0 to 6 and 7 to 11, of which 0 and 1 are prefix and 10 and 11 the question
PIECES = [
    {
        "begin": 2,
        "rows": 5,
        "planned": 0.1,
        "chosen": 0.3,
        "done": 0.4,
        "spans": [
            {"start": 2, "length": 2, "source_start": 2, "tier": "disk", "generation": 0}
            | {"exact": True},
            {"start": 4, "length": 3, "source_start": 14, "tier": "device", "generation": 0}
            | {"exact": False},
        ],
        "scores": [0.5, 3.0, 1.5],
        "recomputed": [5],
    },
    {
        "begin": 7,
        "rows": 5,
        "planned": 0.5,
        "chosen": 0.5,
        "done": 0.6,
        "spans": [
            {"start": 8, "length": 2, "source_start": 0, "tier": "memory", "generation": 1}
            | {"exact": False}
        ],
        "scores": [4.0, None],
        "recomputed": [8],
    },
]
REPORT = {
    "prefix": 2,
    "reused": 5,
    "recomputed": 2,
    "computed": 3,
    "exact": 4,
    "policy": "query",
    "ratio": 0.4,
    "cost": 0.5,
    "fallback": None,
    "explain": {"suffix_start": 10, "pieces": PIECES},
}


def answer(words: list[tuple[str, int]], p: list[dict[int, float]], **meta) -> Answer:
    """An answer of these (text, id), with these probabilities of the likeliest at each place."""
    tops = [[[math.log(q), i, None] for i, q in place.items()] for place in p]
    said = [[math.log(place[i]), i, t] for (t, i), place in zip(words, p, strict=True)]
    meta = {"output_token_logprobs": said, "output_top_logprobs": tops, **meta}
    return Answer("".join(t for t, _ in words), tuple(i for _, i in words), meta, ttft=0.7)


EXACT = answer([("It", 1), (" is", 2), ("x", 3)], [{1: 0.5, 9: 0.25}, {2: 0.9}, {3: 0.9}])
BLENDED = answer(
    [("It", 1), (" was", 4), ("x", 3)],
    [{1: 0.25, 9: 0.5}, {4: 0.5, 2: 0.4}, {3: 0.9}],
    blend=REPORT,
)
ASKED = Asked("m", tuple(range(12)), TEXTS, BLENDED, EXACT)


def test_where_each_token_comes_from():
    page = page_of(ASKED)
    assert [t.kind for t in page.tokens] == (
        ["prefix"] * 2 + ["given"] * 2 + ["reused", "recomputed", "reused", "computed"]
    ) + ["recomputed", "reused", "computed", "computed"]
    assert [t.text for t in page.tokens] == list(TEXTS)
    assert [t.rank for t in page.tokens] == [None] * 4 + [4, 2, 3, None, 1] + [None] * 3
    assert [t.span for t in page.tokens] == [None] * 2 + [1, 1, 2, 2, 2, None, 3, 3, None, None]
    given, device, memory = page.spans
    assert (given.exact, given.moved, given.score) == (True, 0, None)
    assert (device.moved, device.recomputed, device.score) == (-10, 1, 5 / 9)
    assert (memory.moved, memory.generation, memory.score) == (8, 1, 4 / 9)


def test_what_both_say():
    first, second, third = page_of(ASKED).steps
    # The rest, a quarter of exact's, is a quarter of the blended one's too.
    expected = 0.5 * math.log(2) + 0.25 * math.log(0.5)
    assert first.kl == pytest.approx(expected)
    # exact's other likeliest tokens, which the blended answer does not name, are in the rest.
    assert second.kl == pytest.approx(0.9 * math.log(0.9 / 0.4) + 0.1 * math.log(0.1 / 0.6))
    assert (second.exact, second.blended, second.blended_p) == (" is", " was", pytest.approx(0.5))
    assert third.kl is None  # they have read different texts
    assert not page_of(ASKED).same


def test_the_time_line_is_without_gaps_and_ends_at_the_first_token():
    times = page_of(ASKED).times
    assert times[0][1] == 0.0 and times[-1][2] == 0.7
    assert all(a[2] == b[1] for a, b in zip(times, times[1:], strict=False))


def test_the_histogram_holds_every_scored_token():
    bins = histogram(page_of(ASKED))
    assert sum(kept for _, kept, _ in bins) == 2 and sum(again for *_, again in bins) == 2
    assert [b for b, *_ in bins] == sorted(b for b, *_ in bins)
    assert bins[-1][0] == pytest.approx(4.0)


def test_servers_that_tell_nothing():
    plain = Answer("x", (1,), {**BLENDED.meta, "blend": None})
    with pytest.raises(ServerError, match="--enable-blend"):
        page_of(Asked("m", ASKED.ids, TEXTS, plain, EXACT))
    old = {k: v for k, v in REPORT.items() if k != "explain"}
    with pytest.raises(ConfigError, match="single tokens"):
        page_of(Asked("m", ASKED.ids, TEXTS, Answer("", (), {**BLENDED.meta, "blend": old}), EXACT))


class Checked(HTMLParser):
    """Balanced tags, unique ids, and what is in it."""

    VOID = {"meta", "rect"}

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.ids += [v for k, v in attrs if k == "id"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] not in (["style"], ["title"]):
            self.text += data


def test_the_page_is_one_file_with_every_token_as_it_is():
    text = html(page_of(ASKED))
    page = Checked(text)
    assert len(set(page.ids)) == len(page.ids)
    links = [a["href"] for tag, a in page.tags if tag == "a"]
    assert links and all(x[0] == "#" and x[1:] in page.ids for x in links)
    assert not re.search(r"https?:|src=|<script|@import|url\(", text)
    tokens = [a for tag, a in page.tags if tag == "span" and "title" in a]
    assert len(tokens) == len(TEXTS)
    assert tokens[5]["title"] == "5: recomputed, score 3, rank 2"
    prompt = page.text.rpartition("begins at token")[2]
    for shown in ("<s>", " <b>", "river", "⏎", "&"):
        assert shown in prompt
    assert "a lower bound; behind" in page.text
    assert all("scope" in a for tag, a in page.tags if tag == "th")
    assert sum(t == "caption" for t, _ in page.tags) == sum(t == "table" for t, _ in page.tags) == 3
    assert [a["lang"] for tag, a in page.tags if tag == "html"] == ["en"]
    # What can be scrolled can be reached by the keyboard, and has a name.
    panes = [a for _, a in page.tags if a.get("class") in ("scroll", "prompt")]
    assert panes and all(a["tabindex"] == "0" and a["aria-label"] for a in panes)


def test_a_page_of_a_request_that_fell_back():
    report = {**REPORT, "fallback": "images", "policy": None, "ratio": None, "prefix": 0}
    report["explain"] = {"suffix_start": 10, "pieces": [{"begin": 0, "rows": 12, "done": 0.2}]}
    told = Answer("x", (1,), {**BLENDED.meta, "blend": report}, ttft=0.5)
    page = page_of(Asked("m", ASKED.ids, TEXTS, told, EXACT))
    assert {t.kind for t in page.tokens} == {"computed"} and page.spans == ()
    text = Checked(html(page)).text
    assert "full prefill: images" in text and "Scores of the reused" not in text
    assert "max_risk" not in text


def test_a_page_of_a_request_that_its_bound_had_recomputed_more_of():
    for fallback, end in ((None, "were recomputed."), ("risk above max_risk", "in vain.")):
        report = {**REPORT, "raised": 4, "fallback": fallback}
        told = Answer("x", (1,), {**BLENDED.meta, "blend": report}, ttft=0.5)
        text = Checked(html(page_of(Asked("m", ASKED.ids, TEXTS, told, EXACT)))).text
        assert "above max_risk, and 4 more of its tokens" in text and end in text


def _luminance(colour: str) -> float:
    colour = "".join(c * 2 for c in colour) if len(colour) == 3 else colour
    parts = [int(colour[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_texts_stand_out_from_every_ground(scheme):
    """WCAG 2.2, 1.4.3: a contrast of 4.5 at least."""
    sheets = re.findall(r":root \{(.*?)\}", html(page_of(ASKED)), re.S)
    colours = dict(re.findall(r"--(\w+): #(\w+)", sheets[scheme]))
    for text, grounds in (
        ("text", "ground panel prefix given reused recomputed computed"),
        ("soft", "ground panel"),
    ):
        for ground in grounds.split():
            a, b = sorted((_luminance(colours[text]), _luminance(colours[ground])))
            assert (b + 0.05) / (a + 0.05) >= 4.5, (text, ground)


def test_what_is_told_of_a_piece():
    """Scores in the order of the spans that are not exact; of an ordinary piece its place alone."""
    spans = (
        ReuseSpan(3, 2, 3, None, "memory", exact=True),
        ReuseSpan(6, 3, 20, torch.arange(3)),
    )
    tokens = ReusedTokens(
        torch.tensor([6, 7, 8]), torch.tensor([0, 1, 2]), torch.tensor([3, 3, 3]), 1, seed=0
    )
    blend = PieceBlend(
        BlendPlan(0, 12, 10, spans, "query", 0.3),
        POLICIES.get("query"),
        tokens,
        reused=torch.tensor([6, 7, 8]),
        must=torch.tensor([0, 1, 2, 5, 9, 10, 11]),
        src_slots=torch.arange(3),
        src_pos=torch.arange(3),
        told=Told(),
    )
    blend.told.note(3, torch.arange(3), torch.tensor([0.1, float("nan"), 1 / 3]), torch.tensor([2]))
    detail = Detail()
    detail.add(Piece(0, 12, 0, torch.arange(12), blend))
    detail.add(Piece(0, 4, 12, torch.arange(16)))
    first, second = detail.told(10)["pieces"]
    assert first["scores"] == [pytest.approx(0.1), None, 0.333333]
    assert first["recomputed"] == [8] and first["spans"][0]["exact"]
    assert (first["spans"][1]["start"], first["spans"][1]["source_start"]) == (6, 20)
    assert first["planned"] <= first["chosen"] <= first["done"]
    assert second.keys() == {"begin", "rows", "done"}


def test_scores_by_check_layers_stay_with_the_tokens_that_were_dropped():
    told = Told()
    told.note(4, torch.arange(4), torch.tensor([4.0, 1.0, 3.0, 2.0]), torch.tensor([0, 2]))
    told.note(4, torch.tensor([0, 2]), torch.tensor([7.0, 9.0]), torch.tensor([2]))
    assert told.scores.tolist() == [7.0, 1.0, 9.0, 2.0] and told.chosen.tolist() == [2]


def test_the_request_option():
    assert parse_options({"blend_explain": True}, 1).explain
    assert not parse_options({}, 1).explain


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["/nowhere/at/all"], "cannot be read"),
        (["-"], "--out"),
        (["{file}", "--tokens", "0"], "--tokens is 0"),
        (["{empty}"], "holds no text"),
        (["{file}", "--url", "http://127.0.0.1:9"], "no answer"),
    ],
)
def test_what_ends_the_command(tmp_path: Path, capsys, monkeypatch, words, message):
    (tmp_path / "file").write_text("a prompt")
    (tmp_path / "empty").write_text(" \n")
    monkeypatch.setattr("sys.stdin", open(tmp_path / "file"))
    words = [w.format(file=tmp_path / "file", empty=tmp_path / "empty") for w in words]
    assert main(["explain", *words]) == 2
    assert message in capsys.readouterr().err
