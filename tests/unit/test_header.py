"""The header x-blend: its grammar, and which of several ways of saying something counts. Runs on
CPU."""

from __future__ import annotations

import pytest

from sgl_blend.config import BlendConfig
from sgl_blend.engine.request.exchange import Exchange, beside
from sgl_blend.engine.request.header import NAMES, header_options, parse, short
from sgl_blend.engine.request.options import (
    KEYS,
    NO_WISH,
    RequestOptions,
    check_options,
    parse_options,
)
from sgl_blend.errors import RequestError


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("off", {"blend": False}),
        (" ON ", {"blend": True}),
        ("policy=query; ratio=0.2", {"blend_policy": "query", "blend_ratio": 0.2}),
        ("on;ratio=0", {"blend": True, "blend_ratio": 0.0}),
        ("policy = hkvd, coverage = 9e-1,", {"blend_policy": "hkvd", "blend_coverage": 0.9}),
        ("off; boundaries=0 120  480", {"blend": False, "blend_boundaries": [0, 120, 480]}),
        ("boundaries=", {"blend_boundaries": []}),
        ("Blend_Ratio=1", {"blend_ratio": 1.0}),
        ("correction=0.7", {"blend_correction": 0.7}),
        ("anchor_share=0.2", {"blend_anchor_share": 0.2}),
    ],
)
def test_what_the_header_says(text, said):
    assert parse(text) == said
    parse_options(said, None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "x-blend is empty: expected off, on"),
        (" ; ", "x-blend is empty"),
        ("of", "x-blend: 'of': expected off, on, or options such as policy=query; ratio=0.2"),
        ("false", "x-blend: 'false': expected off, on"),
        ("0.2", "x-blend: '0.2': expected"),
        ("polcy=query", "x-blend: unknown option 'polcy'; did you mean 'policy'"),
        ("blend=off", "x-blend: unknown option 'blend'"),
        ("ratio=0.1; ratio=0.2", "x-blend: ratio is given twice"),
        ("on; off", "x-blend: on or off is given twice"),
        ("off; ratio=0.2", "x-blend: off together with ratio: say one of them"),
        ("ratio=2", "x-blend: ratio is 2: expected a number from 0 to 1"),
        ("ratio=much", "x-blend: ratio is 'much': expected a number from 0 to 1"),
        ("ratio=nan", "x-blend: ratio is nan"),
        ("ratio=", "x-blend: ratio is ''"),
        ("coverage=-1", "x-blend: coverage is -1"),
        ("policy=qery", "x-blend: policy: unknown policy 'qery'; did you mean 'query'"),
        ("policy=", "x-blend: policy: unknown policy ''"),
        ("boundaries=5 3", r"x-blend: boundaries\[1\] is 3 after 5"),
        ("boundaries=-2", r"x-blend: boundaries\[0\] is -2: offsets start at 0"),
        ("boundaries=1.5", r"x-blend: boundaries\[0\] is 1\.5: expected an integer"),
        ("ratio=true", "x-blend: ratio is True"),
        ("correction=true", "x-blend: correction is True: expected a number"),
        ("policy=none; ratio=0.2", r"x-blend: ratio is 0\.2: how many tokens policy 'none'"),
        ("policy=stored", "x-blend: policy is 'stored': this server keeps no scores"),
        ("policy=random; coverage=0.5", r"x-blend: coverage is 0\.5: policy 'random' has no score"),
    ],
)
def test_what_is_malformed_is_refused_with_what_and_where(text, message):
    with pytest.raises(RequestError, match=message):
        said = parse(text)
        try:
            check_options(parse_options(said, None), BlendConfig())
        except RequestError as e:
            raise Exchange(header=said).renamed(e) from None


TEXTS = {"policy": "hkvd", "boundaries": "1 2", "head_tokens": "4"}
TEXTS |= dict.fromkeys(("explain", "query_values"), "true")


@pytest.mark.parametrize("key", [key for key in KEYS if key != "blend"])
def test_every_option_of_a_request_can_be_stated(key):
    name = key.removeprefix("blend_")
    said = parse(f"{name}={TEXTS.get(name, '0.5')}")
    assert list(said) == [key]
    options = parse_options(said, None, default=False)
    assert options != parse_options(None, None, default=False)
    assert options.enabled is (key not in NO_WISH)


def test_names_that_routers_pass_on_are_read_too():
    assert NAMES == ("x-blend", "x-sgl-blend", "x-request-id-blend")
    assert header_options([(b"host", b"x"), (b"x-blending", b"off")]) == {}
    for name in NAMES:
        assert header_options([(name.title().encode(), b"off")]) == {"blend": False}
    # A gateway that passes all of them on passes the same on.
    assert header_options([(n.encode(), b"ratio=0.2") for n in NAMES]) == {"blend_ratio": 0.2}


def test_several_headers_say_what_they_say_together():
    one, two = (b"x-blend", b"policy=hkvd"), (b"x-sgl-blend", b"ratio=0.2")
    assert header_options([one, two]) == {"blend_policy": "hkvd", "blend_ratio": 0.2}
    with pytest.raises(RequestError, match="ratio is given twice with different values"):
        header_options([two, (b"x-blend", b"ratio=0.3")])
    with pytest.raises(RequestError, match="off together with policy"):
        header_options([one, (b"x-blend", b"off")])


def test_the_header_goes_before_the_body_but_off_counts_wherever_it_is_said():
    def said(custom, **header):
        return beside(custom, Exchange(header=header))

    assert said(None) is None and said({"x": 1}) == {"x": 1}
    assert said({"blend_ratio": 0.1, "x": 1}, blend_ratio=0.2) == {"blend_ratio": 0.2, "x": 1}
    assert said({"blend_policy": "hkvd"}, blend_ratio=0.2) == {
        "blend_policy": "hkvd",
        "blend_ratio": 0.2,
    }
    assert said({"blend": True}, blend=False)["blend"] is False
    assert said({"blend": False}, blend=True)["blend"] is False
    assert said({"blend": False}, blend_ratio=0.2)["blend"] is False
    dropped = Exchange(header={"blend": True}, body={"blend": False})
    assert beside(None, dropped) == {"blend": False}


@pytest.mark.parametrize(
    ("said", "enabled"),
    [
        (None, False),
        ({}, False),
        ({"other": 1}, False),
        ({"blend_boundaries": [1]}, False),
        ({"blend": True}, True),
        ({"blend_policy": "hkvd"}, True),
        ({"blend_ratio": 0.0}, True),
        ({"blend_coverage": 0.5}, True),
        ({"blend_correction": 0.0}, True),
        ({"blend": False, "blend_ratio": 0.2}, False),
    ],
)
def test_where_the_default_is_off_a_request_says_that_it_wants_to_be_blended(said, enabled):
    options = parse_options(said, 10, default=False)
    assert options.enabled is enabled
    assert options.off_by_default is (not enabled and "blend" not in (said or {}))
    other = parse_options(said, 10)
    assert other.enabled is not ((said or {}).get("blend") is False) and not other.off_by_default


def test_nothing_said_where_the_default_is_off():
    assert parse_options(None, 10, default=False) == RequestOptions(False, off_by_default=True)


def test_the_short_form_of_a_report():
    report = {
        "prefix": 30,
        "reused": 340,
        "recomputed": 60,
        "computed": 100,
        "exact": 30,
        "sources": {"device": 400},
        "policy": "query",
        "ratio": 0.15,
        "coverage": None,
        "correction": None,
        "explained": [{"long": 1}],
        "cost": 0.35,
        "fallback": None,
    }
    assert short(report) == (
        "prefix=30; reused=340; recomputed=60; computed=100; exact=30; cost=0.35; policy=query; "
        "ratio=0.15"
    )
    several = short(report | {"fallback": "session, token types; x"})
    assert several.endswith("; fallback=session + token types + x")
