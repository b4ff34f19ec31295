"""Blending beside everything else a server does, over real HTTP. Needs: CPU, real servers."""

from __future__ import annotations

import concurrent.futures
import json
import re
import threading

import pytest
import requests
from polling import eventually
from talk import Docs, all_at_once, answer_of, ask, body_of, check_report, check_same, words

WORKERS = 8


def stream(server, body):
    """The events of a streaming /generate request."""
    with requests.post(
        server.url + "/generate", json=body | {"stream": True}, stream=True, timeout=300
    ) as r:
        assert r.status_code == 200, r.text
        for line in r.iter_lines():
            if line.startswith(b"data: ") and line != b"data: [DONE]":
                yield json.loads(line[6:])


def idle(server) -> bool:
    """Whether the server runs and queues nothing."""
    loads = requests.get(server.url + "/v1/loads", timeout=30).json()["loads"]
    return all(x["num_running_reqs"] == x["num_waiting_reqs"] == 0 for x in loads)


def test_a_mix_of_blended_and_ordinary_requests(blend, plain):
    d = Docs(30)
    d.warm(blend)
    jobs, kinds = [], []
    for i in range(16):
        p = d.prompt([i % 6, (i + 1) % 6, (i + 4) % 6])
        custom = [{"blend_policy": "all"}, {"blend": False}, {}, {"blend_policy": "hkvd"}][i % 4]
        kinds.append((p, custom))
        jobs.append(lambda p=p, c=custom: ask(blend, p, custom=c, new=12))
    for a, (p, custom) in zip(all_at_once(jobs), kinds, strict=True):
        check_report(a)
        if custom.get("blend_policy") == "all" or custom.get("blend") is False:
            check_same(a, ask(plain, p, new=12))
        else:
            assert a.blend["reused"] > 100


def test_streaming_carries_the_report_and_the_same_text(blend):
    d = Docs(31)
    d.warm(blend)
    p = d.prompt([2, 0, 5])
    whole = ask(blend, p, new=12)
    assert whole.blend["reused"] > 100
    blend.flush()
    d.warm(blend)
    events = list(stream(blend, body_of(p, new=12)))
    assert len(events) > 1
    last = answer_of(events[-1])
    assert last.text == whole.text and last.tokens == whole.tokens
    for e in events:
        assert e["meta_info"]["blend"] == last.blend
    check_report(last)
    assert last.blend["reused"] > 100


def test_two_samples_of_one_prompt(blend):
    d = Docs(32)
    d.warm(blend)
    p = d.prompt([3, 1, 2])
    alone = ask(blend, p)
    got = blend.generate(**body_of(p, s_n=2))
    assert len(got) == 2
    for g in map(answer_of, got):
        check_report(g)
        check_same(g, alone)
    blend.flush()
    d.rng.seed(3)
    d.warm(blend)
    # SGLang fills the cache with the prompt first, without output; that one is blended too.
    for g in map(answer_of, blend.generate(**body_of(p, s_n=2))):
        check_same(g, alone)
    assert ask(blend, p, custom={"blend": False}).blend["prefix"] < 100


def test_structured_output_on_a_blended_prompt(blend, plain):
    docs = [words(40 + i, 30) for i in range(4)]
    for doc in docs:
        ask(blend, f"{doc}\n\nwhat?", custom={"blend": False})
    text = "\n\n".join(["System.", docs[3], docs[0], docs[2], "Give a number, please, now!"])
    a = ask(blend, text, new=24, s_regex=r"[0-9]{3}-[a-z]{4}", s_ignore_eos=False)
    check_report(a)
    assert a.blend["reused"] > 100 and re.fullmatch(r"[0-9]{3}-[a-z]{4}", a.text)
    schema = {
        "type": "object",
        "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 9}},
        "required": ["n"],
        "additionalProperties": False,
    }
    b = ask(
        blend, text, new=48, s_json_schema=json.dumps(schema), s_ignore_eos=False,
        custom={"blend_policy": "all"},
    )  # fmt: skip
    assert 0 <= json.loads(b.text)["n"] <= 9
    check_same(b, ask(plain, text, new=48, s_json_schema=json.dumps(schema), s_ignore_eos=False))


def test_abort_in_the_middle_leaves_the_others_right(blend):
    d = Docs(33)
    d.warm(blend)
    prompts = [d.prompt([i, (i + 2) % 6, (i + 5) % 6]) for i in range(4)]
    want = [ask(blend, p, new=16) for p in prompts]
    started = threading.Semaphore(0)

    def disconnects(p):
        body = body_of(p, new=4000) | {"stream": True}
        with requests.post(blend.url + "/generate", json=body, stream=True, timeout=300) as r:
            next(r.iter_lines())
            started.release()

    def aborted(p, rid):
        events = stream(blend, body_of(p, new=4000, rid=rid))
        next(events)
        started.release()
        return list(events)[-1]

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        gone = [pool.submit(disconnects, d.prompt([1, 2, 3])) for _ in range(3)]
        cut = [pool.submit(aborted, d.prompt([4, 2, 3]), f"abort-{i}") for i in range(3)]
        for _ in range(6):
            assert started.acquire(timeout=120)
        beside = [pool.submit(ask, blend, p, new=16) for p in prompts]
        for i in range(3):
            r = requests.post(blend.url + "/abort_request", json={"rid": f"abort-{i}"}, timeout=60)
            assert r.status_code == 200
        for f in gone:
            f.result(timeout=120)
        for f in cut:
            last = f.result(timeout=120)
            assert last["meta_info"]["finish_reason"]["type"] == "abort"
            assert last["meta_info"]["completion_tokens"] < 4000
        for f, w in zip(beside, want, strict=True):
            check_same(f.result(timeout=120), w)
    assert eventually(lambda: idle(blend), 60.0)
    assert blend.alive()
    check_same(ask(blend, prompts[0], new=16), want[0])


def test_stop_strings(blend):
    docs = [words(50 + i, 30) for i in range(3)]
    for doc in docs:
        ask(blend, f"{doc}\n\nwhat?", custom={"blend": False})
    text = "\n\n".join(["System.", docs[2], docs[0], docs[1], "Go on, if you like, with this."])
    # One letter at a time, so that there is text to stop at.
    free = ask(blend, text, new=20, s_regex=r"[a-z]{20}")
    stop = free.text[6:8]
    assert free.blend["reused"] > 100
    cut = ask(blend, text, new=20, s_regex=r"[a-z]{20}", s_stop=[stop])
    assert cut.text == free.text[: free.text.index(stop)]
    assert cut.meta["finish_reason"] == {"type": "stop", "matched": stop}


def test_output_and_top_logprobs_of_a_blended_request(blend, plain):
    d = Docs(34)
    d.warm(blend)
    p = d.prompt([1, 4, 0])
    got = ask(blend, p, custom={"blend_policy": "all"}, top_logprobs_num=3)
    want = ask(plain, p, top_logprobs_num=3)
    check_same(got, want)
    for a, b in zip(got.meta["output_top_logprobs"], want.meta["output_top_logprobs"], strict=True):
        assert [x[1] for x in a] == [x[1] for x in b]
        assert [x[0] for x in a] == pytest.approx([x[0] for x in b], abs=1e-3)


@pytest.mark.parametrize("server", ["blend", "packed"])
def test_input_logprobs_fall_back_and_are_right(request, plain, server):
    server = request.getfixturevalue(server)
    d = Docs(35)
    d.warm(server)
    p = d.prompt([5, 0, 3])
    got = ask(server, p, logprob_start_len=0)
    check_report(got)
    assert got.blend["fallback"] == "input logprobs" and got.blend["reused"] == 0
    want = ask(plain, p, logprob_start_len=0)
    check_same(got, want)
    a, b = got.meta["input_token_logprobs"], want.meta["input_token_logprobs"]
    assert len(a) == len(p) and [x[1] for x in a] == [x[1] for x in b]
    assert [x[0] for x in a[1:]] == pytest.approx([x[0] for x in b[1:]], abs=1e-3)


def test_input_logprobs_of_the_question_alone_are_blended(blend, plain):
    d = Docs(36)
    d.warm(blend)
    p = d.prompt([2, 5, 1])
    start = len(p) - 8
    got = ask(blend, p, logprob_start_len=start, custom={"blend_policy": "all"})
    check_report(got)
    assert got.blend["recomputed"] > 100 and got.blend["fallback"] is None
    want = ask(plain, p, logprob_start_len=start)
    check_same(got, want)
    a, b = got.meta["input_token_logprobs"], want.meta["input_token_logprobs"]
    assert len(a) == len(b) == 8 and [x[1] for x in a] == [x[1] for x in b]
    assert [x[0] for x in a[1:]] == pytest.approx([x[0] for x in b[1:]], abs=1e-3)


def test_input_logprobs_beside_blended_requests(blend, plain):
    d = Docs(37)
    d.warm(blend)
    prompts = [d.prompt([i, (i + 1) % 6, (i + 2) % 6]) for i in range(6)]
    jobs = [
        (lambda p=p, i=i: ask(blend, p, logprob_start_len=0) if i % 2 else ask(blend, p))
        for i, p in enumerate(prompts)
    ]
    for i, (a, p) in enumerate(zip(all_at_once(jobs), prompts, strict=True)):
        check_report(a)
        if i % 2:
            want = ask(plain, p, logprob_start_len=0)
            check_same(a, want)
            x, y = a.meta["input_token_logprobs"], want.meta["input_token_logprobs"]
            assert [v[0] for v in x[1:]] == pytest.approx([v[0] for v in y[1:]], abs=1e-3)
        else:
            assert a.blend["reused"] > 100


def test_update_of_the_weights_empties_everything_reusable(blend, model):
    d = Docs(38)
    d.warm(blend)
    p = d.prompt([0, 2, 4])
    before = ask(blend, p)
    assert before.blend["reused"] > 100
    r = requests.post(
        blend.url + "/update_weights_from_disk", json={"model_path": str(model)}, timeout=120
    )
    assert r.status_code == 200 and r.json()["success"], r.text
    after = ask(blend, p)
    assert after.blend["computed"] == after.meta["prompt_tokens"], after.blend
    blend.flush()
    d.warm(blend)
    check_same(ask(blend, p), before)


# -- pages, pieces, mixed batches, conversations ---------------------------------------------


@pytest.mark.parametrize("question", [40, 300])
def test_long_prompts_in_small_pieces_equal_plain(packed, plain, question):
    """Pieces of 128 tokens, so the question lies in a later piece than most documents."""
    d = Docs(60)
    d.warm(packed)
    p = d.prompt([0, 3, 1, 5, 2], question=question)
    assert len(p) > 4 * 128
    a = ask(packed, p, custom={"blend_policy": "all"})
    check_report(a)
    assert a.blend["recomputed"] > 200
    check_same(a, ask(plain, p))


@pytest.mark.parametrize("policy", ["query", "hkvd", "leading", "random", "none"])
def test_pieces_report_and_repeat(packed, policy):
    """The question alone fills a piece, so that the prompt is cut."""
    d = Docs(61)
    d.warm(packed)
    p = d.prompt([4, 0, 2, 3], question=140)
    first = ask(packed, p, custom={"blend_policy": policy, "blend_explain": True})
    check_report(first)
    assert first.blend["reused"] > 200 and len(first.blend["explain"]["pieces"]) > 3
    packed.flush()
    d.rng.seed(1)
    d.warm(packed)
    again = ask(packed, p, custom={"blend_policy": policy})
    check_same(again, first)


def test_mixed_chunks_beside_decode(packed, plain):
    d = Docs(62)
    d.warm(packed)
    prompts = [d.prompt([i % 6, (i + 2) % 6, (i + 3) % 6, (i + 4) % 6]) for i in range(8)]
    customs = [{"blend_policy": "all"}, {"blend": False}] * 4
    jobs = [
        lambda p=p, c=c: ask(packed, p, new=24, custom=c)
        for p, c in zip(prompts, customs, strict=True)
    ]
    for a, p in zip(all_at_once(jobs), prompts, strict=True):
        check_report(a)
        check_same(a, ask(plain, p, new=24))


@pytest.mark.parametrize("policy", ["all", "query"])
def test_a_conversation_over_blended_documents(packed, plain, policy):
    """Three turns; with 'extend' each turn's prompt begins with the last one's KV."""
    d = Docs(63)
    d.warm(packed)
    p = d.prompt([1, 5, 0])
    prefix = 0
    for turn in range(3):
        a = ask(packed, p, custom={"blend_policy": policy})
        check_report(a)
        if turn:
            assert a.blend["prefix"] >= prefix
        if policy == "all":
            check_same(a, ask(plain, p))
        prefix = len(p) // 16 * 16
        p = [*p, *a.tokens, *d.tokens(30)]
    exact = ask(packed, p, custom={"blend": False})
    check_same(exact, ask(plain, p))


def test_a_conversation_under_same_blends_again(blend, plain):
    d = Docs(64)
    d.warm(blend)
    p = d.prompt([1, 5, 0])
    first = ask(blend, p)
    again = ask(blend, p)
    assert again.blend["prefix"] == len(p) - 1
    check_same(again, first)
    turn = [*p, *first.tokens, *d.tokens(30)]
    second = ask(blend, turn)
    check_report(second)
    assert second.blend["prefix"] < len(d.prompt([])) and second.blend["reused"] > 100
    exact = ask(blend, turn, custom={"blend_policy": "all"})
    check_same(exact, ask(plain, turn))
