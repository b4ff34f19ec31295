"""What ``sgl-blend eval --out`` keeps of one run for the next. Needs: CPU."""

import contextlib
import json
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sgl_blend.config import BlendConfig
from sgl_blend.engine.request.options import KEYS
from sgl_blend.errors import ConfigError
from sgl_blend.eval.client import Client, Reply
from sgl_blend.eval.cost import Tokens
from sgl_blend.eval.evaluate import EvalOptions, evaluate, tables
from sgl_blend.eval.fidelity import Output
from sgl_blend.eval.identity import (
    ASIDE,
    ASIDE_PREFIXES,
    NEUTRAL,
    SAID,
    configured,
    fingerprint,
    options_that_matter,
    server_arguments,
)
from sgl_blend.eval.ledger import Ledger, question, settings_of
from sgl_blend.eval.probes import Probe, Prompt, Reference, Step, Suite, ways
from sgl_blend.eval.runner import RunOptions
from sgl_blend.eval.samples import samples
from sgl_blend.eval.settings import FULL, PLAIN, parse, plan
from sgl_blend.eval.stats import Bootstrap
from sgl_blend.eval.summary import summarise
from sgl_blend.eval.telling import rank, risks

SECRET = "zanzibar"
#: a server that adds nothing to its policies, whatever the defaults are
NOTHING = dict(correction=0.0, anchor_share=0.0, head_tokens=0, query_values=False)
NOTHING |= dict(query_head_share=0.0, query_layers=0.75)
BARE = BlendConfig(**NOTHING)
BARE_FLAGS = [f"--blend-{name.replace('_', '-')}={value}" for name, value in NOTHING.items()]


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SGL_BLEND_CACHE_DIR", str(tmp_path / "cache"))


def probe(number=0, asked="Who?", held_out=False):
    prompt = Prompt(f"Read. {SECRET}", (f"{SECRET} one", "two"), f"{asked} {number}")
    step = Step(prompt, (Reference("nq", (SECRET,)),), 16)
    return Probe(f"nq.jsonl:{number}", ways(prompt, ("alone", "system")), (step,), held_out)


def reply(kl=0.0, text=SECRET, risk=None):
    rows = ({7: -0.1 - kl, 8: -2.5}, {7: -0.2, 9: -2.0})
    first = {7: -0.1 - kl, 8: -2.5, 9: -5.0}
    tokens = Tokens(100, 0, 80, 10, 10, 100, 1.0 if risk is None else 0.2, None, risk)
    return Reply(0.0, text, Output((7, 7), rows, first), tokens)


SETTINGS = plan(["query:0.1"], (), prefix=False)
MADE = {s.name: fingerprint(s.name) for s in SETTINGS}


def measured(number, *, kl=0.5, risk=None, names=tuple(MADE)):
    one, exact = probe(number), [reply()]
    out = []
    for name in names:
        mine = exact if name == FULL.name else [reply(kl, f"{SECRET} or not", risk)]
        out += samples(one, number, "" if name == FULL.name else "alone", name, None, mine, exact)
    return one, out, exact


def ledger(tmp_path, made=MADE):
    return Ledger(tmp_path / "out", "model", "nq", made)


def test_what_is_on_record_is_known_and_told_as_it_was_measured(tmp_path):
    first = ledger(tmp_path)
    assert first.exact(probe()) is None and first.samples(MADE) == ()
    told = []
    for number in (11, 2):
        one, mine, exact = measured(number)
        told += mine
        first.add(one, mine, exact)
    again = ledger(tmp_path)
    assert again.exact(one) == exact
    assert again.tokens(one, "alone", SETTINGS[2]) == [mine[2].tokens]
    assert again.tokens(one, "system", SETTINGS[2]) is None
    assert again.tokens(probe(3), "alone", SETTINGS[2]) is None
    assert again.tokens(probe(2, "Why?"), "alone", SETTINGS[2]) is None  # another question
    read = again.samples(MADE)
    assert [(s.case, s.probe) for s in read[:3]] == [("nq.jsonl:2", 0)] * 3
    rows = [
        summarise([replace(s, probe=int(s.case[9:])) for s in ss], SETTINGS, "f1", Bootstrap(50))
        for ss in (told, read)
    ]
    for a, b in zip(*rows, strict=True):
        assert a.kl.value == pytest.approx(b.kl.value, rel=1e-4)
        assert (a.f1, a.same, a.top1_clear, a.cost) == (b.f1, b.same, b.top1_clear, b.cost)


def test_records_hold_nothing_of_the_data(tmp_path):
    book = ledger(tmp_path)
    book.add(*measured(0))
    text = (tmp_path / "out" / "records.jsonl").read_text()
    assert SECRET not in text and "Who" not in text and "Read" not in text
    assert json.loads(text.splitlines()[0])["case"] == "nq.jsonl:0"
    # Full prefill's answer, which later settings are compared to, lies in the cache.
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["records.jsonl"]
    [kept] = (tmp_path / "cache" / "eval").rglob("*.json")
    assert SECRET in kept.read_text()


def test_records_of_other_options_are_kept_and_left_out(tmp_path):
    book = ledger(tmp_path)
    book.add(*measured(0))
    other = MADE | {"query:0.1": fingerprint("another default")}
    again = ledger(tmp_path, other)
    assert again.tokens(probe(), "alone", SETTINGS[2]) is None
    assert again.tokens(probe(), "alone", SETTINGS[1]) is not None
    assert {s.setting for s in again.samples(other)} == {"full prefill", "full reuse"}
    [remark] = again.remarks(other)
    assert "left out: 1 of query:0.1" in remark and book.remarks(MADE) == ()
    assert [s.name for s in settings_of(book.labels(), SETTINGS[:1])] == list(MADE)


def test_a_row_of_two_states_of_the_source_says_so(tmp_path, monkeypatch):
    ledger(tmp_path).add(*measured(0))
    monkeypatch.setattr("sgl_blend.eval.ledger.build", lambda: "another")
    book = ledger(tmp_path)
    book.add(*measured(1, names=("full prefill", "query:0.1")))
    assert book.remarks(MADE) == ("query:0.1: measured by 2 states of the source",)


def test_a_line_that_was_cut_off_is_measured_again(tmp_path):
    book = ledger(tmp_path)
    book.add(*measured(0))
    path = tmp_path / "out" / "records.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    again = ledger(tmp_path)
    assert again.tokens(probe(), "alone", SETTINGS[1]) is not None
    assert again.tokens(probe(), "alone", SETTINGS[2]) is None
    again.add(*measured(1))
    assert len(ledger(tmp_path).samples(MADE)) == 5
    path.write_bytes(b'{"model": 1}\n' + whole)
    with pytest.raises(ConfigError, match=r"records.jsonl, line 1: not a record"):
        ledger(tmp_path)


def test_a_table_has_every_row_that_is_on_record(tmp_path):
    book = ledger(tmp_path)
    book.add(*measured(0))
    book.add(*measured(1, names=("full prefill", "full reuse")))
    options = EvalOptions(model="m", data=(Path("nq.jsonl"),), settings=("query:0.3",))
    rows = settings_of(book.labels(), options.planned())
    assert [s.name for s in rows][-1] == "query:0.1"
    [table] = tables(book.samples(MADE), Suite("nq", "f1", ()), options, rows)
    assert [(r.setting, r.cost.n) for r in table.rows] == [
        ("full prefill", 2),
        ("full reuse", 2),
        ("query:0.1", 1),
    ]


def test_a_setting_is_known_by_what_it_does_and_not_by_its_name():
    plain = BARE
    assert options_that_matter(FULL, plain) == {}
    assert options_that_matter(parse("default"), plain) == {"policy": "query", "ratio": 0.1}
    assert options_that_matter(parse("query:0.10"), plain) == {"policy": "query", "ratio": 0.1}
    assert options_that_matter(parse("none"), configured(["--blend-min-ratio", "0.1"])) == {
        "policy": "none"
    }
    # Another default is another setting, for the policies that go by it alone.
    other = configured(["--enable-blend", "--blend-query-layers=0.5", "--page-size", "16"])
    assert options_that_matter(parse("default"), other)["query_layers"] == 0.5
    assert "query_layers" not in options_that_matter(parse("hkvd:0.15"), other)
    wider = configured([], [("check_layers", "1,2")])
    assert options_that_matter(parse("hkvd:0.15+check_layers=1/2"), wider)["check_layers"] == (1, 2)
    assert "ratio" not in options_that_matter(parse("random~default"), plain)
    assert "chunk_max_tokens" in options_that_matter(
        parse("random~default"), configured(["--blend-chunk-max-tokens", "80"])
    )


def test_a_policy_as_published_is_the_same_whatever_the_server_adds():
    server = configured([*BARE_FLAGS, "--blend-correction", "0.7", "--blend-anchor-share", "0.2"])
    bare = options_that_matter(parse("query:0.1"), BARE)
    assert options_that_matter(parse("query:0.1"), server) == bare | {
        "correction": 0.7,
        "anchor_share": 0.2,
    }
    assert options_that_matter(parse("query:0.1;plain"), server) == bare
    half = parse("query:0.1;plain;correction=0.5")
    assert options_that_matter(half, server) == bare | {"correction": 0.5}
    assert half.custom() == {
        "blend_policy": "query",
        "blend_ratio": 0.1,
        **{f"blend_{name}": 0 for name in PLAIN if f"blend_{name}" in KEYS},
        "blend_correction": 0.5,
    }
    assert parse("random;plain~query:0.1;plain").cost_of == "query:0.1;plain"
    with pytest.raises(ConfigError, match=r"no request can state query_layers; \+query_layers=0.5"):
        parse("query:0.1;query_layers=0.5")


def test_every_option_has_a_place_in_a_fingerprint():
    """An option that is in none of these tables counts with its value: put a new one into
    ``NEUTRAL`` with the value at which it does nothing, or old records count no more."""
    config = BlendConfig()
    for name in vars(config):
        aside = name in ASIDE or name.startswith(ASIDE_PREFIXES)
        assert aside + (name in SAID) + (name in NEUTRAL) == 1, name


def test_speed_is_no_part_of_a_fingerprint():
    args = ["--enable-blend", "--blend-gate", "off", "--dtype", "float32", "--page-size=16"]
    fast = [*args, "--max-total-tokens", "8192", "--chunked-prefill-size=4096"]
    assert server_arguments(fast) == server_arguments(args)
    assert server_arguments(args) == ["--dtype", "float32", "--page-size", "16"]


def test_a_question_is_all_that_is_sent_of_it():
    one = probe()
    assert question(one, "alone") == question(probe(), "alone") != question(one, "")
    assert question(one, "alone") != question(one, "system")
    longer = replace(one, steps=(replace(one.steps[0], max_new_tokens=8),))
    assert question(longer, "") != question(one, "")


def test_risk_is_told_beside_what_came_true():
    kls = np.array([0.9, 0.1, 0.4, 0.2, 0.0, 0.3, 0.8, 0.5, 0.6, 0.7])
    told = []
    for number, kl in enumerate(kls):
        told += measured(number, kl=kl, risk=kl**2, names=("full prefill", "query:0.1"))[1]
    [found] = risks(told)
    assert (found.setting, found.n) == ("query:0.1", 10)
    assert found.rank == found.rank_all == pytest.approx(1.0)
    none, *_, everything = found.bounded
    assert (none.share, none.held, none.cost) == (0.0, 0.0, pytest.approx(0.2))
    first = [s.agreement.first for s in told if s.setting == "query:0.1"]
    assert none.kl == pytest.approx(np.mean(first))
    tenth = next(b for b in found.bounded if b.share == 0.1)
    assert tenth.held == pytest.approx(max(first) / sum(first))
    assert tenth.kl == pytest.approx((sum(first) - max(first)) / 10)
    assert tenth.cost == pytest.approx(0.3)
    assert (everything.kl, everything.cost) == (pytest.approx(0.0), pytest.approx(1.2))
    assert risks(told[:8]) == ()
    assert np.isnan(rank(np.ones(9), np.arange(9.0)))


class Standin(Client):
    """Answers as a server would, and notes whom it answered."""

    def __init__(self):
        super().__init__("http://127.0.0.1:9")
        self.asked, self.lock = [], threading.Lock()

    def warm(self, prompts, custom, salt=None):
        pass

    def ask(self, ids, *, custom, max_new_tokens, wanted=None, salt=None, timed=True):
        with self.lock:
            self.asked.append(tuple(sorted(custom.items())))
        logprobs = {t: -2.0 for t in wanted.ids or range(wanted.top)}
        exact = custom == {"blend": False}
        tokens = Tokens(10, 0, 0, 0, 10, 10, 1.0, "disabled by the request")
        if not exact:
            tokens = Tokens(10, 0, 8, 1, 1, 10, 0.2, None)
        return Reply(0.0, SECRET, Output((4,), (logprobs,)), tokens)


def test_a_command_goes_on_where_another_ended(tokenizer, tmp_path, monkeypatch):
    data = tmp_path / "musique.jsonl"
    context = "Passage 1:\nThe old mill.\nPassage 2:\nThe new mill.\n"
    asked = [{"input": f"Where? {i}", "context": context, "answers": ["here"]} for i in range(3)]
    data.write_text("".join(json.dumps(a) + "\n" for a in asked))
    servers = []

    @contextlib.contextmanager
    def clients(options, settings, progress):
        servers.append(Standin())
        yield {(): servers[-1]}

    monkeypatch.setattr("sgl_blend.eval.evaluate._clients", clients)

    def run(limit, settings, **options):
        options = EvalOptions(
            model=str(tokenizer),
            data=(data,),
            limit=limit,
            settings=settings,
            twins=(),
            seen=("alone",),
            bootstrap=Bootstrap(20),
            run=RunOptions("probe", at_once=2, probes_at_once=2),
            out=tmp_path / "out",
            **options,
        )
        return [{r.setting: r.cost.n for r in done.tables[0].rows} for done in evaluate(options)]

    assert run(1, ("query:0.1",), recorded=True) == [] == servers
    rows = {"full prefill": 2, "full reuse": 2, "query:0.1": 2}
    assert run(2, ("query:0.1",)) == [rows] and len(servers) == 1
    # The same again, fewer, and what is on record by another name: no server is started.
    for limit, settings in ((2, ("query:0.1",)), (1, ("query:0.10",)), (1, ("default",))):
        [told] = run(limit, settings)
        assert told[settings[0]] == 2
    assert len(servers) == 1
    # One more question, and one more setting of all three.
    [told] = run(3, ("query:0.1", "query:0.3"))
    assert told == {"full prefill": 3, "full reuse": 3, "query:0.1": 3, "query:0.3": 3}
    count = servers[1].asked.count
    plain, more = {"blend_policy": "query", "blend_ratio": 0.1}, {"blend_ratio": 0.3}
    assert count(tuple(plain.items())) == 1 and count(tuple((plain | more).items())) == 3
    assert count((("blend", False),)) == 1
    # A server with another option is another setting.
    [told] = run(3, ("query:0.1",), server_args=("--blend-query-layers", "0.5"))
    assert len(servers) == 3 and servers[2].asked.count(tuple(plain.items())) == 3
