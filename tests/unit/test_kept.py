"""Requests that are kept to be explained afterwards: which, who may read them, and the page. CPU; a
real server is in tests/server/test_routes.py."""

from __future__ import annotations

import asyncio
import copy
import types
from array import array
from dataclasses import replace

import pytest
from sglang.srt.managers.io_struct import GetInternalStateReq, GetInternalStateReqOutput
from test_explain import ASKED, Checked

from sgl_blend import attach
from sgl_blend.cli.explain import html
from sgl_blend.cli.explaining import page_of
from sgl_blend.cli.main import main
from sgl_blend.config import BlendConfig
from sgl_blend.engine.launch.kept_route import check_readers, explained
from sgl_blend.engine.request.counts import Counts
from sgl_blend.engine.request.kept import OUTPUT, KeptRequests, answering
from sgl_blend.engine.request.options import RequestOptions
from sgl_blend.engine.request.state import RequestState
from sgl_blend.errors import ConfigError
from sgl_blend.gate.state import GateState
from sgl_blend.harness.client import Answer
from sgl_blend.plan import BlendRecord
from sgl_blend.selection import POLICIES


def served(kept: KeptRequests, rid: str, *, reused: int = 5, name: str | None = "n", **more):
    """A request goes through ``kept``; SGLang's ``Req`` as far as it is read."""
    state = RequestState(RequestOptions(), POLICIES.get("query"), 0.1, False, GateState(0.1))
    kept.watch(state)
    state.counts = Counts(4, prefix=2, reused=reused, computed=3)
    if reused:
        state.counts.sources["device"] = reused
    state.record = None if name is None else BlendRecord(namespace=name)
    req = types.SimpleNamespace(
        rid=rid, origin_input_ids=array("q", [7, 8, 9]), output_ids=array("q"), lora_id=None
    )
    vars(req).update(more)
    kept.add(req, state)
    return req


def test_the_latest_are_kept_and_no_more():
    kept = KeptRequests(2)
    for i in range(5):
        served(kept, f"r{i}", name=f"n{i}")
    assert [kept.told(f"r{i}") is not None for i in range(5)] == [False] * 3 + [True] * 2
    assert set(kept._blended) == {"n3", "n4"}
    told = kept.told("r4")
    assert told["ids"] == [7, 8, 9] and told["report"]["reused"] == 5
    assert told["explain"] == {"suffix_start": 0, "pieces": []} and told["earlier"] is None


def test_what_reused_nothing_is_not_kept():
    kept = KeptRequests(2)
    served(kept, "exact", reused=0, name=None)
    state = RequestState(RequestOptions(), POLICIES.get("query"), 0.1, False, GateState(0.1))
    state.fallback = "session"
    kept.watch(state)
    assert state.detail is None
    kept.add(types.SimpleNamespace(rid="fell back"), state)
    assert kept.told("exact") is kept.told("fell back") is None


def test_a_prompt_that_was_blended_before_names_the_request_that_did():
    """Its siblings with n > 1, and whoever asks the same again."""
    kept = KeptRequests(3)
    served(kept, "first")
    served(kept, "second", reused=0)
    served(kept, "of another", reused=0, name="other")
    assert kept.told("second")["earlier"]["id"] == "first"
    assert kept.told("of another")["earlier"] is None
    served(kept, "first", name="new")  # its id comes again: it is the latest now
    assert "n" not in kept._blended and kept.told("second")["earlier"]["id"] == "first"


def test_an_answer_is_told_as_far_as_it_has_come():
    kept = KeptRequests(1)
    req = served(kept, "r", lora_id="a")
    assert kept.told("r")["output"] == [] and kept.told("r")["adapter"]
    req.output_ids.extend(range(OUTPUT + 9))
    assert kept.told("r")["output"] == list(range(OUTPUT))


# -- who may read them ------------------------------------------------------------------------


class Manager:
    """SGLang's ``TokenizerManager`` in front of data-parallel schedulers."""

    def __init__(self, last: int, ranks: tuple[KeptRequests | None, ...] = (), **keys) -> None:
        keys = {"api_key": None, "admin_api_key": None, **keys}
        self.server_args = types.SimpleNamespace(**keys)
        attach.CONFIG.set(self.server_args, BlendConfig(explain_last=last))
        self.ranks = [answering(kept) for kept in ranks]

    def auto_create_handle_loop(self) -> None:
        """There is one already."""

    async def get_internal_state_communicator(self, req: GetInternalStateReq):
        return [rank(self._own, None, req) for rank in self.ranks]

    def _own(self, controller, recv_req: GetInternalStateReq) -> GetInternalStateReqOutput:
        return GetInternalStateReqOutput(internal_state={"asked": recv_req.rid})

    def get(self, rid: str | None, key: str | None) -> tuple[int, str | dict]:
        said = None if key is None else f"Bearer {key}"
        status, body = asyncio.run(explained(self, rid, said))
        return status, body["error"]["message"] if "error" in body else body


def test_the_admin_key_alone_opens_what_is_kept():
    first, second = KeptRequests(4), KeptRequests(4)
    served(second, "r")
    manager = Manager(4, (first, second), api_key="everybody's", admin_api_key="admin's")
    for key in (None, "everybody's", "x"):
        status, message = manager.get("r", key)
        assert status == 401 and "--admin-api-key" in message
    status, told = manager.get("r", "admin's")
    assert status == 200 and told["id"] == "r"
    assert manager.get(None, "admin's")[0] == 400
    status, message = manager.get("other", "admin's")
    assert status == 404 and "'other'" in message and "--blend-explain-last 4" in message
    # Whoever asks for the state itself gets it.
    answer = asyncio.run(manager.get_internal_state_communicator(GetInternalStateReq()))
    assert [a.internal_state for a in answer] == [{"asked": None}] * 2


def test_a_server_that_keeps_none_says_how_to():
    status, message = Manager(0, admin_api_key="a").get("r", "a")
    assert status == 404 and "--blend-explain-last N" in message


def test_without_a_key_for_readers_nothing_is_kept(monkeypatch):
    check_readers(Manager(0).server_args)
    check_readers(Manager(2, admin_api_key="a").server_args)
    for keys in ({}, {"api_key": "everybody's"}):
        with pytest.raises(ConfigError, match="--blend-explain-last 2 keeps prompts.*--admin-api"):
            check_readers(Manager(2, **keys).server_args)
    monkeypatch.setenv("SGLANG_RUST_SERVER", "1")
    with pytest.raises(ConfigError, match="SGLANG_RUST_SERVER"):
        check_readers(Manager(2, admin_api_key="a").server_args)


# -- the page ---------------------------------------------------------------------------------


def about(words: list[tuple[str, int]], **changes):
    """What was told of a request that is over, beside exact prefill's answer."""
    said = [[None, i, text] for text, i in words]
    meta = {**ASKED.blended.meta, "output_token_logprobs": said, "output_top_logprobs": None}
    blended = Answer("".join(t for t, _ in words), tuple(i for _, i in words), meta)
    meta["blend"] = copy.deepcopy(meta["blend"])
    return replace(ASKED, blended=blended, request="r-1", **changes)


def test_a_page_of_a_request_that_is_over():
    page = page_of(about([("It", 1), (" was", 4), ("x", 3)]))
    assert [t.kind for t in page.tokens] == [t.kind for t in page_of(ASKED).tokens]
    assert not page.same and [s.blended for s in page.steps] == ["It", " was", "x"]
    assert {(s.blended_p, s.kl) for s in page.steps} == {(None, None)}
    assert page.times == page_of(ASKED).times[:-1] and page.ttft == (None, 0.7)
    text = Checked(html(page)).text
    assert "r-1" in text and "as it was served" in text and "0.600 s after it arrived" in text
    assert "underlined. Exact" in " ".join(text.split()) and "served. Behind" in text
    assert page_of(about([("It", 1), (" is", 2), ("x", 3)])).same


def test_a_page_without_exact_prefill():
    page = page_of(about([("It", 1)], exact=None, no_exact="nobody asked"))
    assert page.steps == () and page.ttft == (None, None)
    text = Checked(html(page)).text
    assert "left out: nobody asked" in text and "Greedy tokens" not in text


def test_a_page_of_a_prompt_that_an_earlier_request_had_blended():
    asked = about([], exact=None, no_exact="nobody asked")
    report = asked.blended.blend
    own = [{"begin": 11, "rows": 1, "done": 0.1}]
    report |= {"prefix": 11, "reused": 0, "recomputed": 0, "computed": 1, "exact": 2}
    pieces = report["explain"]["pieces"]
    report["explain"] = {"suffix_start": 10, "pieces": own}
    page = page_of(replace(asked, earlier={"id": "r-0", "pieces": pieces}))
    kinds = [t.kind for t in page.tokens]
    assert kinds[:2] == ["prefix"] * 2 and kinds[10:] == ["again", "computed"]
    assert kinds[2:7] == [t.kind for t in page_of(ASKED).tokens[2:7]] and kinds[7] == "again"
    assert page.times == (("prefill", 0.0, 0.1),)
    assert "request r-0" in Checked(html(page)).text


def test_the_same_text_has_the_same_digest_wherever_it_stands():
    pieces = [{"begin": 0, "rows": 12, "done": 0.1, "spans": []}]
    for start, exact in ((1, False), (4, False), (7, True)):
        span = {"start": start, "length": 3, "source_start": 0, "tier": "disk", "generation": 0}
        pieces[0]["spans"].append({**span, "exact": exact})
    asked = about([], exact=None, ids=(0, 5, 6, 7, 5, 6, 7, 5, 6, 8, 0, 0))
    asked.blended.blend["explain"]["pieces"] = pieces
    first, second, third = page_of(asked).spans
    assert first.text == second.text != third.text


def test_what_was_given_up_was_computed():
    pieces = [{"begin": 0, "rows": 12, "done": 0.1, "recomputed": [1, 2, 3, 4]}]
    span = {"length": 2, "source_start": 0, "tier": "disk", "generation": 0}
    pieces[0]["spans"] = [{**span, "start": 1, "exact": True}, {**span, "start": 3, "exact": False}]
    asked = about([], exact=None)
    asked.blended.blend["explain"]["pieces"] = pieces
    assert [s.recomputed for s in page_of(asked).spans] == [2, 2]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "name a FILE"),
        (["a", "--request", "r"], "and not both"),
        (["--request", "r"], "--out"),
        (["--request", "r", "--json", "--ratio", "0.1"], "--ratio is for a prompt that is sent"),
        (["--request", "r", "--json", "--cache-salt", "x"], "--cache-salt is for"),
        (["a", "--admin-api-key", "x"], "--admin-api-key is for --request"),
        (["--request", "r", "--json", "--tokens", "-1"], "--tokens is -1"),
        (["--request", "r", "--json", "--url", "http://127.0.0.1:9"], "no answer"),
    ],
)
def test_what_ends_the_command(capsys, words, message):
    assert main(["explain", *words]) == 2
    assert message in capsys.readouterr().err
