"""Per-request control, report, refusals and tenants, over real HTTP. Needs: CPU, real servers."""

from __future__ import annotations

import concurrent.futures

import pytest
import requests
from talk import (
    SEP,
    Docs,
    answer_of,
    ask,
    body_of,
    check_report,
    check_same,
    counts,
    deviation,
    refused,
    words,
)

# -- report ------------------------------------------------------------------------------


def test_counts_add_up_for_token_ids(blend):
    d = Docs(1)
    d.warm(blend)
    a = ask(blend, d.prompt([3, 1, 5, 0]))
    check_report(a)
    assert a.blend["policy"] == "query" and a.blend["ratio"] == 0.1 and a.blend["fallback"] is None
    documents = sum(len(d.docs[i]) for i in (3, 1, 5, 0))
    assert a.blend["reused"] + a.blend["recomputed"] >= 0.9 * documents
    assert a.blend["sources"].keys() == {"device"}
    assert 0 < a.blend["cost"] < 0.5


def test_counts_add_up_for_text(blend):
    docs = [words(10 + i, 30) for i in range(4)]
    for doc in docs:
        ask(blend, f"{doc}\n\nwhat is it?", custom={"blend": False})
    a = ask(blend, "\n\n".join(["You answer.", docs[2], docs[0], docs[3], "Which word is next?"]))
    check_report(a)
    assert a.blend["reused"] + a.blend["recomputed"] >= 0.9 * sum(len(docs[i]) for i in (2, 0, 3))


def test_a_prompt_with_nothing_to_reuse_reports_full_prefill(blend):
    a = ask(blend, Docs(2).prompt([0, 1]))
    check_report(a)
    n = a.meta["prompt_tokens"]
    assert a.blend["computed"] == n == a.blend["exact"]
    assert a.blend["policy"] is None and a.blend["fallback"] is None and a.blend["cost"] == 1.0


def test_the_same_document_twice_in_a_prompt_is_reused_twice(blend):
    d = Docs(3, count=2, size=(120, 120))
    d.warm(blend)
    a = ask(blend, d.prompt([1, 0, 1, 1]))
    check_report(a)
    assert a.blend["reused"] + a.blend["recomputed"] >= 0.9 * 480


def test_ratio_and_policy_of_the_request_are_used(blend):
    d = Docs(4)
    d.warm(blend)
    p = d.prompt([2, 4, 1])
    for policy in ("hkvd", "query", "leading", "random"):
        a = ask(blend, p, custom={"blend_policy": policy, "blend_ratio": 0.5})
        check_report(a)
        assert a.blend["policy"] == policy and a.blend["ratio"] == 0.5
        total = a.blend["reused"] + a.blend["recomputed"]
        assert abs(a.blend["recomputed"] - 0.5 * total) <= 1
    none = ask(blend, p, custom={"blend_policy": "none"})
    assert none.blend["recomputed"] == 0 < none.blend["reused"]


def test_coverage_of_the_request_is_used_and_what_it_took_is_told(blend):
    d = Docs(4)
    d.warm(blend)
    p = d.prompt([2, 4, 1])
    took = {"query": [], "hkvd": []}
    for policy, seen in took.items():
        for coverage in (0.2, 0.5, 0.999):
            custom = {"blend_policy": policy, "blend_ratio": 0.8, "blend_coverage": coverage}
            a = ask(blend, p, custom=custom)
            check_report(a)
            assert a.blend["coverage"] == coverage and a.blend["ratio"] == 0.8
            share = a.blend["recomputed"] / (a.blend["reused"] + a.blend["recomputed"])
            assert 0.02 <= share <= 0.81
            seen.append((share, a.blend["cost"]))
        assert seen == sorted(set(seen)), f"{policy}: {seen}"
    plain = ask(blend, p, custom={"blend_ratio": 0.8, "blend_coverage": 0})
    assert plain.blend["coverage"] is None
    fixed = ask(blend, p, custom={"blend_policy": "leading", "blend_ratio": 0.8})
    assert fixed.blend["coverage"] is None


def test_coverage_with_several_answers_to_one_prompt(blend):
    d = Docs(14)
    d.warm(blend)
    custom = {"blend_ratio": 0.8, "blend_coverage": 0.5}
    bodies = blend.generate(**body_of(d.prompt([3, 0, 2]), custom=custom, s_n=3))
    answers = [answer_of(b) for b in bodies]
    for a in answers:
        check_report(a)
    assert len({a.tokens for a in answers}) == 1


def test_stated_boundaries_find_documents_that_content_cuts_miss(blend):
    d = Docs(5, count=4, size=(20, 24))
    for doc in d.docs:
        ask(
            blend,
            [1, *doc, *d.tokens(40)],
            custom={"blend": False, "blend_boundaries": [1, 1 + len(doc)]},
        )
    system = d.tokens(6)
    offsets, prompt = [], [1, *system]
    for i in (2, 0, 3, 1):
        offsets.append(len(prompt))
        prompt += d.docs[i]
    offsets.append(len(prompt))
    a = ask(blend, [*prompt, *d.tokens(40)], custom={"blend_boundaries": offsets})
    check_report(a)
    assert a.blend["reused"] + a.blend["recomputed"] == sum(len(x) for x in d.docs)


def test_completions_and_chat_endpoints_blend_and_report(blend):
    docs = [words(20 + i, 30) for i in range(4)]
    url = blend.url + "/v1/"
    sampling = {"temperature": 0, "max_tokens": 4, "ignore_eos": True}

    def chat(system, text, **custom):
        body = {
            "model": "default",
            "messages": [
                {"role": "system", "content": system},
                {"role": "user", "content": text},
            ],
            "return_meta_info": True,
            "custom_params": custom or None,
            **sampling,
        }
        r = requests.post(url + "chat/completions", json=body, timeout=300)
        assert r.status_code == 200, r.text
        return r.json()

    for doc in docs:
        chat("You answer.", doc, blend=False)
    got = chat("You think.", "\n\n".join([docs[3], docs[1], docs[0], "Which word is next?"]))
    b = got["choices"][0]["meta_info"]["blend"]
    assert counts(b) == got["usage"]["prompt_tokens"]
    assert b["reused"] + b["recomputed"] >= 0.9 * sum(len(docs[i]) for i in (3, 1, 0))

    text = "\n\n".join(["Answer:", docs[2], docs[3], docs[1], "Which word is next?"])
    for custom in ({"blend_policy": "all"}, {"blend": False}):
        body = {"model": "default", "prompt": text, "logprobs": 1, "custom_params": custom}
        r = requests.post(url + "completions", json={**body, **sampling}, timeout=300)
        assert r.status_code == 200, r.text
        tokens = r.json()["choices"][0]["logprobs"]["token_logprobs"]
        want = ask(blend, text, custom={"blend": False}, new=4)
        assert tokens == pytest.approx(want.logprobs, abs=1e-3)


# -- exact requests ----------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["query", "hkvd", "none"])
def test_an_exact_request_never_sees_approximate_kv(blend, plain, policy):
    """The blended request comes first, twice, so that its KV lies in the tree; then the same
    prompt, its next turn, and another question over the same documents, exactly."""
    d = Docs(6)
    d.warm(blend)
    p = d.prompt([4, 2, 0, 5])
    first = ask(blend, p, custom={"blend_policy": policy})
    ask(blend, p, custom={"blend_policy": policy})
    turn = [*p, *first.tokens, *d.tokens(20)]
    other = [*p[:-40], *d.tokens(40)]
    for prompt in (p, turn, other):
        exact = ask(blend, prompt, custom={"blend": False})
        check_report(exact)
        b = exact.blend
        assert b["reused"] == b["recomputed"] == 0 and b["exact"] == exact.meta["prompt_tokens"]
        assert b["fallback"] == "disabled by the request"
        check_same(exact, ask(plain, prompt))
    # The yardstick bites: blending this prompt is visibly not exact.
    exact = ask(plain, p)
    assert first.tokens != exact.tokens or deviation(first, exact) > 1e-2


def test_exact_prefill_is_bit_for_bit_that_of_a_plain_server(blend, plain):
    """Same requests in the same order, one at a time, from empty caches: same shapes."""
    plain.flush()
    d = Docs(7)
    prompts = [d.prompt([i, (i + 1) % 6, (i + 3) % 6]) for i in range(4)]
    for p in prompts + prompts[:2]:
        a = ask(blend, p, custom={"blend": False})
        b = ask(plain, p)
        assert a.tokens == b.tokens and a.logprobs == b.logprobs
        assert a.meta["cached_tokens"] == b.meta["cached_tokens"]
        assert a.text == b.text


def test_exact_prefill_stays_bit_for_bit_plain_beside_blended_requests(blend, plain):
    """The same documents and question were blended before, by several policies, behind other
    system prompts. (Behind the same one, the blended prefill leaves that prompt's exact KV as a
    prefix, computed in a batch of another shape: equal to rounding, see above.)"""
    plain.flush()
    d = Docs(71)
    for doc in d.docs:
        p = [1, *doc, SEP, *d.tokens(40)]
        a, b = (ask(s, p, new=1, custom={"blend": False}) for s in (blend, plain))
        assert a.logprobs == b.logprobs
    for i in range(4):
        p = d.prompt([i, (i + 1) % 6, (i + 3) % 6])
        for policy in ("query", "hkvd", "none"):
            near = [1, *d.tokens(12), *p[13:]]
            assert ask(blend, near, custom={"blend_policy": policy}).blend["reused"] > 100
        a, b = ask(blend, p, custom={"blend": False}), ask(plain, p)
        assert a.tokens == b.tokens and a.logprobs == b.logprobs and a.text == b.text
        assert a.meta["cached_tokens"] == b.meta["cached_tokens"] == 1
        assert a.blend["fallback"] == "disabled by the request"
        assert a.blend["exact"] == a.meta["prompt_tokens"]


def test_policy_all_equals_plain(blend, plain):
    d = Docs(8)
    d.warm(blend)
    for order in ([0, 3, 1], [5, 2, 4, 0], [1, 1, 2]):
        p = d.prompt(order)
        a = ask(blend, p, custom={"blend_policy": "all"})
        check_report(a)
        assert a.blend["recomputed"] > 100 and a.blend["reused"] == 0
        assert a.blend["exact"] == a.meta["prompt_tokens"]
        check_same(a, ask(plain, p))
    # What it computed is exact, so it may be a prefix of exact requests.
    again = ask(blend, p, custom={"blend": False})
    assert again.blend["prefix"] > 100
    check_same(again, ask(plain, p))


# -- refusals ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("custom", "said"),
    [
        ({"blend": "yes"}, "custom_params.blend is 'yes'"),
        ({"blend_ratio": 2}, "custom_params.blend_ratio is 2"),
        ({"blend_ratio": "0.1"}, "custom_params.blend_ratio is '0.1'"),
        ({"blend_coverage": 2}, "custom_params.blend_coverage is 2"),
        ({"blend_policy": "qery"}, "did you mean 'query'"),
        ({"blend_policy": "stored"}, "keeps no scores; launch it with --blend-stored-scores true"),
        ({"blend_boundries": [1]}, "did you mean 'blend_boundaries'"),
        ({"blend_boundaries": [5, 3]}, "blend_boundaries[1] is 3 after 5"),
        ({"blend_boundaries": [-2]}, "blend_boundaries[0] is -2"),
        ({"blend_boundaries": [0, 100000]}, "blend_boundaries[1] is 100000, past the prompt's end"),
        ({"blend_boundaries": [1.5]}, "blend_boundaries[0] is 1.5"),
        ({"blend_boundaries": "0,5"}, "blend_boundaries is a str"),
        ({"blend_boundaries": [[0, 5]]}, "blend_boundaries"),
    ],
)
def test_malformed_options_are_a_400_on_every_endpoint(blend, custom, said):
    def check(path, body):
        # JSON inside JSON may escape quotes
        assert said in refused(blend, path, body).replace('\\"', '"').replace("\\'", "'")

    ids = list(range(300, 340))
    check("/generate", body_of(ids, custom=custom))
    check("/generate", body_of("some text of a prompt", custom=custom))
    check("/generate", body_of(ids, custom=custom, stream=True))
    openai = {"model": "default", "max_tokens": 2, "custom_params": custom}
    check("/v1/completions", {**openai, "prompt": "some text of a prompt"})
    check("/v1/completions", {**openai, "prompt": "some text of a prompt", "stream": True})
    messages = [{"role": "user", "content": "some text"}]
    check("/v1/chat/completions", {**openai, "messages": messages})


def test_one_malformed_request_of_a_batch_is_a_400(blend):
    ids = list(range(300, 340))
    body = {
        "input_ids": [ids, ids],
        "sampling_params": [
            {"max_new_tokens": 2},
            {"max_new_tokens": 2, "custom_params": {"blend_ratio": -1}},
        ],
    }
    assert "blend_ratio is -1" in refused(blend, "/generate", body)


@pytest.mark.parametrize("custom", [[], [1], "blend", 7])
def test_custom_params_that_are_no_mapping_are_a_400(blend, custom):
    body = body_of(list(range(300, 340)), custom=custom)
    assert "expected a mapping" in refused(blend, "/generate", body)


def test_the_server_goes_on_beside_refusals(blend):
    d = Docs(9)
    d.warm(blend)
    p = d.prompt([0, 1, 2])
    want = ask(blend, p)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        bad = [
            pool.submit(refused, blend, "/generate", body_of(p, custom={"blend_ratio": 9}))
            for _ in range(8)
        ]
        good = [pool.submit(ask, blend, p) for _ in range(4)]
        assert all("blend_ratio is 9" in f.result() for f in bad)
        for f in good:
            check_same(f.result(), want)


# -- tenants -----------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["cache_salt", "extra_key"])
def test_tenants_never_share(blend, key):
    d = Docs(11)
    d.warm(blend, **{key: "alice"})
    p = d.prompt([3, 0, 2])
    for other in ({key: "bob"}, {}):
        a = ask(blend, p, **other)
        check_report(a)
        assert a.blend["computed"] == a.meta["prompt_tokens"], a.blend
    mine = ask(blend, p, **{key: "alice"})
    assert mine.blend["reused"] > 100


def test_salt_and_extra_key_are_not_confused(blend):
    d = Docs(12)
    d.warm(blend, cache_salt="x")
    a = ask(blend, d.prompt([1, 2, 3]), extra_key="x")
    assert a.blend["computed"] == a.meta["prompt_tokens"]
    both = ask(blend, d.prompt([1, 2, 3]), extra_key="x", cache_salt="x")
    assert both.blend["computed"] == both.meta["prompt_tokens"]


# -- caches ------------------------------------------------------------------------------


def test_flush_cache_empties_everything_reusable(blend):
    d = Docs(13)
    d.warm(blend)
    p = d.prompt([0, 4, 3])
    assert ask(blend, p).blend["reused"] > 100
    blend.flush()
    a = ask(blend, p)
    assert a.blend["computed"] == a.meta["prompt_tokens"], a.blend


def test_a_batch_body_answers_each_prompt_with_its_own_report(blend, plain):
    d = Docs(14)
    d.warm(blend)
    prompts = [d.prompt([i, (i + 2) % 6, (i + 3) % 6]) for i in range(4)]
    customs = [{"blend_policy": "all"}, {"blend": False}, {"blend_policy": "all"}, {}]
    params = [
        {"temperature": 0, "max_new_tokens": 6, "ignore_eos": True, "custom_params": c}
        for c in customs
    ]
    got = blend.generate(input_ids=prompts, sampling_params=params, return_logprob=True)
    answers = [answer_of(g) for g in got]
    for a, c, p in zip(answers, customs, prompts, strict=True):
        check_report(a)
        if c:
            check_same(a, ask(plain, p, new=6))
    assert [a.blend["policy"] for a in answers] == ["all", None, "all", "query"]
