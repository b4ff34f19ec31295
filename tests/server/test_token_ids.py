"""Token ids that no model has, on every route that takes some: a 400, and the server goes on.
Needs: CPU, a real server."""

from __future__ import annotations

import json

import pytest
import requests
from talk import Docs, ask

#: the test model's vocabulary has 2,048 ids
VOCAB = 2048
GREEDY = {"temperature": 0, "max_new_tokens": 2}

#: ids as they stand in the body, and what the answer says (None: whatever)
MALFORMED = {
    "negative": ("[-1, 5, 6]", "input_ids[0] is -1: the model's token ids are 0 to 2047"),
    "first beyond the vocabulary": (f"[5, {VOCAB}]", "input_ids[1] is 2048"),
    # SGLang pads its embedding to a multiple of 64; this model's needs none
    "far beyond the vocabulary": ("[5, 2147483648]", "input_ids[1] is 2147483648"),
    "64 bits": ("[9223372036854775807, 5]", "input_ids[0] is 9223372036854775807"),
    "more than 64 bits": ("[5, 18446744073709551616]", None),
    "40 digits": ("[5, " + "9" * 40 + "]", None),
    "a float": ("[5, 6.5]", None),
    "a whole float": ("[5, 6.0]", None),
    "a float first": ("[5.5, 6]", None),
    "a text": ('[5, "6"]', None),
    "null": ("[5, null]", None),
    "a truth value": ("[true, 5]", None),
    "a list inside": ("[5, [6]]", None),
    "two deep": ("[[[5]]]", None),
    "an object": ('[5, {"a": 1}]', None),
    "one of a batch": ("[[5, 6], [7, -7]]", "input_ids[1] is -7"),
    "a batch with a gap": ("[[5, 6], null]", None),
    "a number": ("5", None),
    "an object alone": ('{"a": 5}', None),
}


def post(server, path: str, body: dict | str) -> requests.Response:
    data = body if isinstance(body, str) else json.dumps(body)
    headers = {"Content-Type": "application/json"}
    return requests.post(server.url + path, data=data, headers=headers, timeout=120)


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_ids_are_refused(blend, name):
    ids, said = MALFORMED[name]
    body = f'{{"input_ids": {ids}, "sampling_params": {json.dumps(GREEDY)}}}'
    r = post(blend, "/generate", body)
    assert 400 <= r.status_code < 500, (r.status_code, r.text[:300])
    assert said is None or said in r.text


@pytest.mark.parametrize("bad", [-1, VOCAB, 1 << 40])
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/generate", {"input_ids": [5, "BAD"], "sampling_params": {**GREEDY, "n": 2}}),
        ("/generate", {"input_ids": [5, "BAD"], "sampling_params": GREEDY, "stream": True}),
        ("/v1/completions", {"prompt": [5, "BAD"], "max_tokens": 2}),
        ("/v1/completions", {"prompt": [[5, 6], [5, "BAD"]], "max_tokens": 2}),
        ("/v1/chat/completions", {
            "messages": [{"role": "user", "content": "a"}], "input_ids": [5, "BAD"],
            "max_tokens": 2,
        }),
        ("/v1/score", {"query": [5, 6], "items": [[7, "BAD"]], "label_token_ids": [8, 9]}),
        ("/v1/score", {"query": [5, 6], "items": [[7, 8]], "label_token_ids": [8, "BAD"]}),
    ],
)  # fmt: skip
def test_every_route_refuses_ids_outside_the_vocabulary(blend, path, body, bad):
    text = json.dumps({"model": "default", **body} if path.startswith("/v1") else body)
    r = post(blend, path, text.replace('"BAD"', str(bad)))
    stream_error = r.status_code == 200 and '"code": 400' in r.text.replace('":4', '": 4')
    assert r.status_code == 400 or stream_error, (r.status_code, r.text[:300])


def test_ids_at_both_ends_of_the_vocabulary_are_served(blend):
    assert len(ask(blend, [0, VOCAB - 1, 5, 6], new=2).tokens) == 2


@pytest.mark.parametrize(
    "more",
    [
        {"stop_token_ids": [-1]},
        {"stop_token_ids": [VOCAB + 5]},
        {"logit_bias": {"-1": 5.0}},
        {"logit_bias": {str(VOCAB): 5.0}},
        {"logit_bias": {"a": 5.0}},
    ],
)
def test_ids_among_the_sampling_parameters_end_no_server(blend, more):
    body = {"input_ids": [5, 6], "sampling_params": {**GREEDY, **more}}
    post(blend, "/generate", body)
    prompt = Docs(91).prompt([0])
    assert len(ask(blend, prompt, new=2).tokens) == 2
