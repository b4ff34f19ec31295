"""Which processes take requests, and what the launch says of those that do not know blending.
Runs on CPU."""

from __future__ import annotations

import os
import types

import pytest

from sgl_blend import attach
from sgl_blend.config import BlendConfig
from sgl_blend.engine.launch import frontends
from sgl_blend.engine.request.exchange import CURRENT, Exchange
from sgl_blend.engine.request.options import validate_request
from sgl_blend.errors import RequestError


def arguments(workers: int = 1):
    args = types.SimpleNamespace(tokenizer_worker_num=workers)
    attach.COMMAND_LINE.set(args, True)
    return args


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setattr("sgl_blend.engine.launch.routes.add_routes", lambda: None)
    monkeypatch.setattr("sgl_blend.engine.launch.info.add_info", lambda: None)
    monkeypatch.setattr("sgl_blend.engine.launch.kept_route.add_kept_route", lambda: None)
    # Undone with the test, whatever it sets.
    monkeypatch.setenv(frontends.APP_PATH, "x")
    monkeypatch.delenv(frontends.APP_PATH)


def test_tokenizer_workers_import_the_application_with_hooks(capfd):
    frontends.prepare(arguments(1), first=True)
    assert frontends.APP_PATH not in os.environ
    for first in (True, False):
        frontends.prepare(arguments(2), first)
        assert os.environ[frontends.APP_PATH] == "sgl_blend.engine.launch.worker_app:app"
    assert capfd.readouterr().err == ""


def test_an_application_of_the_operators_own_is_left_and_told_of_once(monkeypatch, capfd):
    monkeypatch.setenv(frontends.APP_PATH, "mine:app")
    for first in (True, False):
        frontends.prepare(arguments(2), first)
    assert os.environ[frontends.APP_PATH] == "mine:app"
    said = capfd.readouterr().err
    assert said.count("\n") == 1 and "import sgl_blend.engine.launch.worker_app" in said


def test_the_rust_server_is_told_of_in_one_line(monkeypatch, capfd):
    monkeypatch.setenv("SGLANG_RUST_SERVER", "1")
    for first in (True, False):
        frontends.prepare(arguments(), first)
    said = capfd.readouterr().err
    assert said.count("\n") == 1 and "the header x-blend is not read" in said


# -- what a request and the server's preferred parameters say together -----------------------


def request(**params):
    return types.SimpleNamespace(sampling_params=params, rid="r")


def checked(obj, preferred=None, exchange=None):
    """``custom_params`` of ``obj`` as SGLang reads them after validation."""
    args = types.SimpleNamespace(**{attach.CONFIG.name: BlendConfig()})
    manager = types.SimpleNamespace(
        server_args=args,
        model_config=types.SimpleNamespace(vocab_size=100),
        preferred_sampling_params=preferred,
    )
    before = CURRENT.set(exchange)
    try:
        validate_request(lambda *a: None, manager, obj, [1, 2, 3])
    finally:
        CURRENT.reset(before)
    return {**(preferred or {}), **obj.sampling_params}.get("custom_params")


def test_the_header_is_put_beside_the_requests_own_params():
    own = {"custom_params": {"x": 1, "blend_ratio": 0.1}}
    obj = request(**own)
    header = Exchange(header={"blend_ratio": 0.2})
    assert checked(obj, exchange=header) == {"x": 1, "blend_ratio": 0.2}
    assert own == {"custom_params": {"x": 1, "blend_ratio": 0.1}}
    assert checked(request(), exchange=header) == {"blend_ratio": 0.2}
    assert checked(request(), exchange=Exchange(body={"blend": False})) == {"blend": False}
    untouched = request(custom_params=None)
    assert checked(untouched, exchange=Exchange()) is None


def test_preferred_sampling_params_hold_on_routes_that_write_null():
    preferred = {"custom_params": {"blend": False, "x": 1}}
    assert checked(request(), preferred) == {"blend": False, "x": 1}
    assert checked(request(custom_params=None), preferred) == {"blend": False}
    assert checked(request(custom_params={"y": 2}), preferred) == {"blend": False, "y": 2}
    assert checked(request(custom_params={"blend": True}), preferred) == {"blend": True}
    on = Exchange(header={"blend": True})
    assert checked(request(custom_params=None), preferred, on) == {"blend": True}
    assert checked(request(), preferred, on) == {"blend": True, "x": 1}


def test_the_exchange_learns_why_a_prompt_was_refused():
    exchange = Exchange(header={"blend_boundaries": [4]})
    with pytest.raises(RequestError, match=r"x-blend: boundaries\[0\] is 4, past the prompt"):
        checked(request(custom_params={"blend_ratio": 0.2}), exchange=exchange)
    assert "past the prompt's end" in str(exchange.refused)
    exchange = Exchange(header={"blend_ratio": 0.2})
    with pytest.raises(RequestError, match=r"custom_params\.blend_ratio is 2"):
        checked(request(custom_params={"blend_ratio": 2}), exchange=exchange)
