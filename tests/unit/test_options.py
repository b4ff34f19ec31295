"""A request's blend options: what is read, what is refused and how. Needs: CPU."""

from __future__ import annotations

import types
from array import array

import numpy as np
import pytest

from sgl_blend import attach
from sgl_blend.config import BlendConfig
from sgl_blend.engine.request.options import RequestOptions, parse_options, validate_request
from sgl_blend.errors import RequestError

VOCAB = 2048


def manager(**options) -> types.SimpleNamespace:
    """What a request is checked against: the HTTP process of a server with these options."""
    return types.SimpleNamespace(
        server_args=types.SimpleNamespace(**{attach.CONFIG.name: BlendConfig(**options)}),
        model_config=types.SimpleNamespace(vocab_size=VOCAB),
    )


def passes(manager, obj, input_ids) -> None:
    """SGLang's own validation, of a request that it accepts."""


def test_nothing_said_leaves_all_to_the_configuration():
    for nothing in (None, {}, {"other": 1}, {"x": [1]}):
        assert parse_options(nothing, 10) == RequestOptions(True, None, None, None)


def test_all_options_are_read():
    said = {
        "blend": True,
        "blend_ratio": 0.2,
        "blend_coverage": 0.9,
        "blend_policy": "hkvd",
        "blend_boundaries": [0, 4, 10],
        "blend_correction": 0.7,
        "blend_anchor_share": 0.1,
        "blend_head_tokens": 4,
        "blend_query_values": False,
        "blend_query_head_share": 0.2,
        "blend_max_risk": 3,
        "someone_elses": {"a": 1},
    }
    assert parse_options(said, 10) == RequestOptions(
        True,
        0.2,
        "hkvd",
        (0, 4, 10),
        0.9,
        correction=0.7,
        head_tokens=4,
        anchor_share=0.1,
        query_values=False,
        query_head_share=0.2,
        max_risk=3.0,
    )


@pytest.mark.parametrize("ratio", [0, 1, 0.0, 1.0])
def test_ratio_may_be_a_whole_number_at_either_end(ratio):
    got = parse_options({"blend_ratio": ratio}, None).ratio
    assert got == ratio and isinstance(got, float)


def test_a_policy_without_a_score_may_be_told_that_coverage_is_off():
    assert parse_options({"blend_coverage": 0, "blend_policy": "random"}, None).coverage == 0.0


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ([], r"custom_params is a list: expected a mapping"),
        ("blend", r"custom_params is a str: expected a mapping"),
        ({"blend": "no"}, r"custom_params\.blend is 'no': expected true or false"),
        ({"blend": 1}, r"custom_params\.blend is 1: expected true or false"),
        ({"blend": None}, r"custom_params\.blend is None"),
        ({"blend_ratio": 1.5}, r"custom_params\.blend_ratio is 1\.5"),
        ({"blend_ratio": -0.1}, r"custom_params\.blend_ratio is -0\.1"),
        ({"blend_ratio": True}, r"custom_params\.blend_ratio is True"),
        ({"blend_ratio": "0.2"}, r"custom_params\.blend_ratio is '0\.2'"),
        ({"blend_ratio": float("nan")}, r"custom_params\.blend_ratio is nan"),
        ({"blend_coverage": 1.5}, r"custom_params\.blend_coverage is 1\.5: expected a number"),
        ({"blend_max_risk": -0.1}, r"custom_params\.blend_max_risk is -0\.1: expected a number, 0"),
        ({"blend_max_risk": True}, r"custom_params\.blend_max_risk is True"),
        ({"blend_max_risk": float("nan")}, r"custom_params\.blend_max_risk is nan"),
        ({"blend_coverage": False}, r"custom_params\.blend_coverage is False"),
        ({"blend_correction": 1.5}, r"custom_params\.blend_correction is 1\.5: expected a number"),
        (
            {"blend_head_tokens": -1},
            r"custom_params\.blend_head_tokens is -1: expected a number of",
        ),
        ({"blend_head_tokens": 2.5}, r"blend_head_tokens is 2\.5"),
        ({"blend_head_tokens": True}, r"blend_head_tokens is True"),
        ({"blend_query_values": 1}, r"blend_query_values is 1: expected true or false"),
        ({"blend_query_head_share": 2}, r"blend_query_head_share is 2: expected a number from 0"),
        ({"blend_policy": "hkvdd"}, r"blend_policy: unknown policy 'hkvdd'; did you mean 'hkvd'"),
        ({"blend_policy": 3}, r"blend_policy: unknown policy '3'"),
        ({"blend_polcy": "hkvd"}, r"unknown key 'blend_polcy'; did you mean 'blend_policy'"),
        ({"blending": True}, r"unknown key 'blending'; did you mean 'blend'"),
        ({"blend_boundaries": 5}, r"blend_boundaries is a int: expected a flat list"),
        ({"blend_boundaries": {"a": 1}}, r"blend_boundaries is a dict: expected a flat list"),
        ({"blend_boundaries": [0, "4"]}, r"blend_boundaries\[1\] is '4': expected an integer"),
        ({"blend_boundaries": [0, 4.0]}, r"blend_boundaries\[1\] is 4\.0: expected an integer"),
        ({"blend_boundaries": [0, True]}, r"blend_boundaries\[1\] is True: expected an integer"),
        ({"blend_boundaries": [-1, 4]}, r"blend_boundaries\[0\] is -1: offsets start at 0"),
        ({"blend_boundaries": [4, 4]}, r"blend_boundaries\[1\] is 4 after 4: offsets must ascend"),
        ({"blend_boundaries": [6, 4]}, r"blend_boundaries\[1\] is 4 after 6: offsets must ascend"),
        ({"blend_boundaries": [0, 11]}, r"blend_boundaries\[1\] is 11, past the prompt's end \(10"),
    ],
)
def test_malformed_options_are_refused_with_what_and_where(said, message):
    with pytest.raises(RequestError, match=message):
        parse_options(said, 10)


def test_a_boundary_at_the_very_end_is_a_boundary():
    assert parse_options({"blend_boundaries": [10]}, 10).boundaries == (10,)


def test_without_a_known_prompt_length_the_end_is_not_checked():
    assert parse_options({"blend_boundaries": [10_000]}, None).boundaries == (10_000,)


def test_a_request_error_is_a_value_error_so_that_it_becomes_a_400():
    assert issubclass(RequestError, ValueError)


def test_validation_sees_sampling_params_of_the_request():
    def request(custom):
        return types.SimpleNamespace(sampling_params={"custom_params": custom})

    server = manager()
    validate_request(passes, server, request({"blend": False}), [1, 2, 3])
    validate_request(passes, server, types.SimpleNamespace(), [1, 2, 3])
    validate_request(passes, server, request(None), None)
    with pytest.raises(RequestError, match="past the prompt's end"):
        validate_request(passes, server, request({"blend_boundaries": [4]}), [1, 2, 3])


@pytest.mark.parametrize(
    ("server", "said", "message"),
    [
        ({}, {"blend_ratio": 0.2, "blend_policy": "none"}, "blend_ratio is 0.2: .* policy 'none'"),
        ({}, {"blend_ratio": 1.0, "blend_policy": "all"}, "blend_ratio is 1.0: .* policy 'all'"),
        ({"policy": "none"}, {"blend_ratio": 0}, "blend_ratio is 0.0: .* policy 'none'"),
        (
            {"leading_tokens": 8},
            {"blend_ratio": 0.2, "blend_policy": "leading"},
            "blend_ratio is 0.2: .* policy 'leading'",
        ),
        (
            {},
            {"blend_coverage": 0.5, "blend_policy": "leading"},
            "blend_coverage is 0.5: policy 'leading' has no score to cover",
        ),
        ({"policy": "random"}, {"blend_coverage": 0.5}, "policy 'random' has no score to cover"),
        ({"policy": "none"}, {"blend_correction": 0.7}, "blend_correction is 0.7: policy 'none'"),
        ({}, {"blend_policy": "all", "blend_correction": 1}, "blend_correction is 1.0: .* 'all'"),
        ({"policy": "none"}, {"blend_head_tokens": 4}, "blend_head_tokens is 4: .* 'none'"),
        ({"policy": "hkvd"}, {"blend_query_values": True}, "blend_query_values is true: .* 'hkvd'"),
        (
            {},
            {"blend_query_head_share": 0.2, "blend_policy": "random"},
            "blend_query_head_share is 0.2: policy 'random' does not ask the question",
        ),
        ({"policy": "none"}, {"blend_anchor_share": 0.2}, "blend_anchor_share is 0.2: .* 'none'"),
        (
            {"leading_tokens": 8},
            {"blend_anchor_share": 0.2, "blend_policy": "leading"},
            "blend_anchor_share is 0.2: .* 'leading'",
        ),
        (
            {},
            {"blend_max_risk": 0.1, "blend_policy": "none"},
            "blend_max_risk is 0.1: policy 'none' recomputes nothing",
        ),
    ],
)
def test_what_the_policy_makes_nothing_of_is_refused(server, said, message):
    request = types.SimpleNamespace(sampling_params={"custom_params": said})
    with pytest.raises(RequestError, match=message):
        validate_request(passes, manager(**server), request, [1, 2, 3])


@pytest.mark.parametrize(
    ("server", "said"),
    [
        ({"policy": "none"}, {"blend_policy": "query", "blend_ratio": 0.2}),
        ({"policy": "none", "coverage": 0.5}, {}),
        ({"leading_tokens": 8}, {"blend_ratio": 0.2}),
        ({}, {"blend_policy": "leading", "blend_ratio": 0.2}),
        ({}, {"blend_policy": "none", "blend_coverage": 0}),
        ({}, {"blend_policy": "none", "blend_correction": 0, "blend_anchor_share": 0}),
        ({"correction": 0.7, "anchor_share": 0.1}, {"blend_policy": "all"}),
        (
            {"leading_tokens": 8},
            {"blend_policy": "leading", "blend_correction": 0.7},
        ),
    ],
)
def test_what_the_policy_heeds_is_accepted(server, said):
    request = types.SimpleNamespace(sampling_params={"custom_params": said})
    validate_request(passes, manager(**server), request, [1, 2, 3])


def test_a_policy_whose_scores_are_not_kept_is_refused_with_what_to_do():
    stored = types.SimpleNamespace(sampling_params={"custom_params": {"blend_policy": "stored"}})
    for kept in ({"stored_scores": True}, {"policy": "stored"}):
        validate_request(passes, manager(**kept), stored, [1, 2, 3])
    with pytest.raises(RequestError, match="keeps no scores; launch it with --blend-stored-scores"):
        validate_request(passes, manager(), stored, [1, 2, 3])


@pytest.mark.parametrize(
    "ids",
    [
        None,
        [],
        [0, VOCAB - 1],
        (1, 2),
        array("q", [1, 2]),
        np.array([1, 2]),
        [np.int64(3), 4],
    ],
)
def test_token_ids_of_the_vocabulary_pass(ids):
    validate_request(passes, manager(), types.SimpleNamespace(), ids)


@pytest.mark.parametrize(
    ("ids", "said"),
    [
        ([-1, 5, 6], r"input_ids\[0\] is -1: the model's token ids are 0 to 2047"),
        ([5, VOCAB], r"input_ids\[1\] is 2048"),
        ([5, 1 << 70], r"input_ids\[1\] is 1180591620717411303424"),
        ([5, 10**60], r"input_ids\[1\] is 1000000000000000000000000000000000000\.\.\.:"),
        ([5, 6.0], r"input_ids\[1\] is 6\.0: expected a token id"),
        ([5, float("nan")], r"input_ids\[1\] is nan"),
        ([5, [6]], r"input_ids\[1\] is \[6\]"),
        ([5, None], r"input_ids\[1\] is None"),
        ([5, "6"], r"input_ids\[1\] is '6'"),
        ([True, 5], r"input_ids\[0\] is True"),
        (7, "input_ids is a int: expected a flat list"),
        ({"a": 1}, "input_ids is a dict"),
        (np.array([[1, 2]]), r"input_ids\[0\] is \[1, 2\]"),
    ],
)
def test_other_token_ids_are_refused_before_sglang_looks_at_them(ids, said):
    def reached(manager, obj, input_ids):
        raise AssertionError("SGLang's validation saw them")

    with pytest.raises(RequestError, match=said):
        validate_request(reached, manager(), types.SimpleNamespace(), ids)
