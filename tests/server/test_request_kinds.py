"""Each kind of request that SGLang's routes make, over real HTTP: blended, or computed in full with
its reason; and answered as by a plain server where it is exact. Needs: CPU, real servers."""

from __future__ import annotations

import concurrent.futures
from typing import Any

import pytest
import requests
from polling import eventually
from sglang.srt.sampling.custom_logit_processor import DisallowedTokensLogitsProcessor
from talk import Docs, answer_of, ask, body_of, check_report, check_same, words

from sgl_blend.harness.server import Server

ALL = {"blend_policy": "all"}


def post(server: Server, path: str, body: Any = None) -> Any:
    r = requests.post(server.url + path, json=body, timeout=300)
    assert r.status_code == 200, f"{path}: {r.status_code}: {r.text[:300]}"
    return r.json() if r.text else None


def texts(seed: int, server: Server, count: int = 4) -> list[str]:
    """Documents of words that the server has seen, each alone."""
    docs = [words(1000 * seed + i, 30) for i in range(count)]
    for doc in docs:
        ask(server, f"{doc}\n\nwhat is it?", new=1, custom={"blend": False})
    return docs


def blended_before(server: Server, prompt: list[int] | str) -> None:
    """The server holds approximate KV of this very prompt: some request blended it."""
    b = ask(server, prompt, new=1).blend
    assert b["prefix"] == b["prefix"] + b["computed"] - 1 and b["exact"] < b["prefix"], b


def close(a: list[float], b: list[float]) -> None:
    assert a == pytest.approx(b, abs=1e-3)


# -- log-probabilities ---------------------------------------------------------------------


def test_completions_that_echo_the_prompt_with_logprobs_are_full_prefill(blend, plain):
    docs = texts(1, blend)
    text = "\n\n".join(["Answer:", docs[2], docs[0], docs[1], "Which word is next?"])
    body = {"model": "default", "prompt": text, "max_tokens": 4, "temperature": 0}
    body |= {"ignore_eos": True, "echo": True, "logprobs": 2}
    # Blended first, so that there is approximate KV which it must not stand on.
    assert ask(blend, text, new=4).blend["reused"] > 100
    ours, its = (post(s, "/v1/completions", body)["choices"][0] for s in (blend, plain))
    assert ours["text"] == its["text"] and ours["text"].startswith(text)
    assert ours["logprobs"]["tokens"] == its["logprobs"]["tokens"]
    mine, right = (x["logprobs"]["token_logprobs"] for x in (ours, its))
    assert len(mine) == len(text) + 4
    close(mine[1:], right[1:])


def test_completions_that_echo_the_prompt_alone_are_blended(blend, plain):
    docs = texts(2, blend)
    text = "\n\n".join(["Answer:", docs[2], docs[0], docs[1], "Which word is next?"])
    body = {"model": "default", "prompt": text, "max_tokens": 4, "temperature": 0}
    body |= {"ignore_eos": True, "echo": True, "custom_params": {"blend_policy": "none"}}
    ours = post(blend, "/v1/completions", body)["choices"][0]
    assert ours["text"].startswith(text)
    b = ask(blend, text, new=1, custom=body["custom_params"]).blend
    assert b["exact"] < b["prefix"], b
    exact = post(blend, "/v1/completions", body | {"custom_params": ALL})["choices"][0]
    assert exact["text"] == post(plain, "/v1/completions", body)["choices"][0]["text"]


FORMS = {
    "text": {"return_text_in_logprobs": True, "top_logprobs_num": 2},
    "ids": {"token_ids_logprob": [5, 300, 7]},
    "flat": {"top_logprobs_num": 2, "return_flat_raw_output_top_logprobs": True},
    "mask": {"return_sampling_mask": True},
    "ids of the prompt": {"return_prompt_token_ids": True},
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_output_logprobs(blend, plain, form):
    """All are of rows that always run."""
    d = Docs(204)
    d.warm(blend)
    p = d.prompt([2, 0, 3])
    got = ask(blend, p, new=4, custom=ALL, **FORMS[form])
    check_report(got)
    assert got.blend["recomputed"] > 100
    want = ask(plain, p, new=4, **FORMS[form])
    check_same(got, want)
    assert got.meta.keys() - {"blend"} == want.meta.keys()
    for key in set(want.meta) & {
        "output_token_ids_logprobs",
        "output_top_logprobs",
        "output_token_sampling_mask",
        "prompt_token_ids",
    }:
        assert shape(got.meta[key]) == shape(want.meta[key]), key


def shape(value: Any) -> Any:
    """A nested value with its numbers rounded away from what batches of another shape change."""
    if isinstance(value, list | tuple):
        return [shape(v) for v in value]
    if isinstance(value, dict):
        return {k: shape(v) for k, v in value.items()}
    return round(value, 2) if isinstance(value, float) else value


# -- scores ------------------------------------------------------------------------------


def test_a_score_of_labels_behind_a_prompt_is_blended(blend, plain):
    """``/v1/score`` over one item a prompt asks for the next token's log-probabilities alone."""
    d = Docs(205)
    d.warm(blend)
    p = d.prompt([4, 1, 0])
    body = {"model": "default", "query": p[:-20], "items": [p[-20:]], "label_token_ids": [7, 9]}
    # Its question is its item's end; that of the whole prompt here.
    score = post(blend, "/v1/score", body)["scores"][0]
    assert len(score) == 2
    blended_before(blend, p)
    # The same request where it can say how: with no output token, and exact.
    labels = {"token_ids_logprob": [7, 9]}
    got = ask(blend, p, new=0, custom=ALL, **labels)
    assert got.blend["recomputed"] > 100
    want = ask(plain, p, new=0, **labels)
    mine, right = (x.meta["output_token_ids_logprobs"][0] for x in (got, want))
    assert [v[1] for v in mine] == [v[1] for v in right] == [7, 9]
    close([v[0] for v in mine], [v[0] for v in right])


def test_a_decision_is_blended(blend):
    docs = texts(16, blend)
    question = {"id": "q", "type": "choice", "question": "Which?"}
    question["options"] = [{"name": "a"}, {"name": "b", "description": "two"}]
    text = "\n\n".join(["Read.", docs[2], docs[0], docs[1]])
    body = {"input": text, "questions": [question], "return_prompt_token_ids": True}
    answers = post(blend, "/v1/decisions", body)["answers"]
    answer = answers[0] if isinstance(answers, list) else answers["q"]
    assert set(answer["probabilities"]) == {"a", "b"}
    blended_before(blend, answer["prompt_token_ids"])


def test_scores_of_prompt_tokens_are_full_prefill(blend, plain):
    d = Docs(206)
    d.warm(blend)
    p = d.prompt([4, 1, 0])
    assert ask(blend, p, new=1).blend["reused"] > 100
    more = {"token_ids_logprob": [7, 9], "logprob_start_len": 5}
    got = ask(blend, p, new=0, **more)
    assert got.blend["fallback"] == "scoring request" and got.blend["reused"] == 0
    assert got.blend["exact"] == len(p)
    want = ask(plain, p, new=0, **more)
    mine, right = (x.meta["input_token_ids_logprobs"] for x in (got, want))
    assert len(mine) == len(right) == len(p) - 5
    close([v[0] for x in mine[1:] for v in x], [v[0] for x in right[1:] for v in x])


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/encode", {"text": "a b"}),
        ("/classify", {"text": "a b"}),
        ("/v1/embeddings", {"model": "default", "input": "a b"}),
        ("/v1/classify", {"model": "default", "input": "a b"}),
        ("/v1/rerank", {"query": "a", "documents": ["b", "c"]}),
        ("/generate", {"input_embeds": [[0.1] * 64] * 8}),
    ],
)
def test_what_this_server_does_not_do_is_refused_as_by_plain_sglang(blend, plain, path, body):
    """Embeddings, classes and ranks of an embedding model, and embeddings in place of a prompt,
    which SGLang takes without a radix cache alone."""
    d = Docs(207)
    answers = [requests.post(s.url + path, json=body, timeout=120) for s in (blend, plain)]
    mine, right = ((a.status_code, a.text[:60]) for a in answers)
    assert mine[0] == right[0] == 400, (mine, right)
    assert len(ask(blend, d.prompt([0]), new=2).tokens) == 2


# -- sessions ------------------------------------------------------------------------------


def test_turns_of_a_session_are_full_prefill(blend, plain):
    d = Docs(211)
    d.warm(blend)
    answers = []
    turns = [d.prompt([1, 3, 0]), [*d.docs[4], *d.tokens(20)]]
    assert ask(blend, turns[0]).blend["reused"] > 100
    for server in (blend, plain):
        session = post(server, "/open_session", {"capacity_of_str_len": 10000})
        rid, got = None, []
        for turn in turns:
            a = ask(server, turn, session_params={"id": session, "rid": rid})
            rid = a.meta["id"]
            got.append(a)
        post(server, "/close_session", {"session_id": session})
        answers.append(got)
    for mine, right in zip(*answers, strict=True):
        check_report(mine)
        assert mine.blend["fallback"] == "session" and mine.blend["reused"] == 0
        assert mine.blend["exact"] == mine.meta["prompt_tokens"]
        check_same(mine, right)


def test_the_name_of_a_session_alone_changes_nothing(blend):
    d = Docs(212)
    d.warm(blend)
    a = ask(blend, d.prompt([1, 3, 0]), session_id="somebody")
    assert a.blend["reused"] > 100 and a.blend["fallback"] is None


# -- pausing -------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["retract", "in_place"])
def test_a_pause_in_the_middle(blend, plain, mode):
    """Retracted requests are prefilled again when the server goes on, blended or not as before."""
    d = Docs(213)
    d.warm(blend)
    asked = [(d.prompt([i, (i + 2) % 6, (i + 5) % 6]), c) for i, c in enumerate([ALL, {}] * 2)]
    want = [ask(plain if c else blend, p, new=300) for p, c in asked]

    def paused(pool: concurrent.futures.Executor) -> bool:
        """All four are right, and were paused while they ran: not so on a machine that lets this
        process wait for too long."""
        jobs = [pool.submit(ask, blend, p, new=300, custom=c) for p, c in asked]
        eventually(lambda: running(blend) == 4 or any(job.done() for job in jobs), 60.0)
        post(blend, "/pause_generation", {"mode": mode})
        in_time = not any(job.done() for job in jobs)
        post(blend, "/continue_generation", {})
        for job, right in zip(jobs, want, strict=True):
            got = job.result(timeout=300)
            check_report(got)
            check_same(got, right)
        return in_time

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert any(paused(pool) for _ in range(5)), "over each time before it could be paused"


def running(server: Server) -> int:
    loads = requests.get(server.url + "/v1/loads", timeout=30).json()["loads"]
    return sum(x["num_running_reqs"] for x in loads)


# -- what a server may be told to serve: one server with all of it ---------------------------


def test_a_custom_logit_processor_shares_its_parameters_with_ours(packed):
    d = Docs(216)
    d.warm(packed)
    p = d.prompt([2, 0, 5])
    free = ask(packed, p, new=1, custom=ALL)
    packed.flush()
    d.warm(packed)
    processor = DisallowedTokensLogitsProcessor.to_str()
    custom = {"token_ids": list(free.tokens), **ALL}
    a = ask(packed, p, new=1, custom=custom, custom_logit_processor=processor)
    check_report(a)
    assert a.blend["policy"] == "all" and a.blend["recomputed"] > 100
    assert not set(a.tokens) & set(free.tokens)


def test_priority_takes_turns_and_changes_no_answer(packed, plain):
    """A request of a higher priority may end another's turn; that one is prefilled again."""
    d = Docs(217)
    d.warm(packed)
    asked = [(d.prompt([i, (i + 2) % 6, (i + 5) % 6]), {"priority": i % 3}) for i in range(6)]
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        jobs = [pool.submit(ask, packed, p, new=24, custom=ALL, **more) for p, more in asked]
        for job, (p, _) in zip(jobs, asked, strict=True):
            a = job.result()
            check_report(a)
            check_same(a, ask(plain, p, new=24))


def test_tools_and_reasoning_are_of_the_output(packed):
    docs = texts(18, packed)
    text = "\n\n".join([docs[2], docs[0], docs[1], "Which word is next?"])
    function = {
        "name": "look",
        # Otherwise its arguments may be any JSON, a string without an end among it.
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"at": {"type": "integer", "minimum": 0, "maximum": 9}},
            "required": ["at"],
            "additionalProperties": False,
        },
    }
    body = {
        "model": "default",
        "messages": [{"role": "user", "content": text}],
        "tools": [{"type": "function", "function": function}],
        "tool_choice": {"type": "function", "function": {"name": "look"}},
        "temperature": 0,
        "max_tokens": 200,
        "chat_template_kwargs": {"enable_thinking": False},
        "return_meta_info": True,
    }
    choice = post(packed, "/v1/chat/completions", body)["choices"][0]
    assert choice["meta_info"]["blend"]["reused"] > 100, choice
    [call] = choice["message"]["tool_calls"]
    assert call["function"]["name"] == "look"
    del body["tools"], body["tool_choice"], body["chat_template_kwargs"]
    body |= {"separate_reasoning": True, "max_tokens": 8, "custom_params": {"blend_ratio": 0.3}}
    choice = post(packed, "/v1/chat/completions", body)["choices"][0]
    assert choice["meta_info"]["blend"]["ratio"] == 0.3
    assert "reasoning_content" in choice["message"]


def test_several_answers_of_different_lengths(blend):
    """``n`` > 1 with sampling: each choice is one request over the same KV."""
    d = Docs(219)
    d.warm(blend)
    p = d.prompt([2, 0, 5])
    body = body_of(p, new=12, s_n=3, s_temperature=1.0, s_ignore_eos=False, s_top_k=20)
    for a in map(answer_of, blend.generate(**body)):
        check_report(a)
