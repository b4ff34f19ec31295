"""What a launch finds wrong before it loads a model. Needs: CPU; no server. The launch command
itself is in ``tests/server/test_launch.py``."""

from __future__ import annotations

import socket
import types

import pytest
from sglang.srt.server_args import ServerArgs

from sgl_blend import attach
from sgl_blend.config import BlendConfig
from sgl_blend.engine.launch.checks import check_model_path, check_port, model_problems
from sgl_blend.engine.launch.own_store import start_store
from sgl_blend.errors import ConfigError, StoreError
from sgl_blend.store.config import load_config
from sgl_blend.store.embedded import EmbeddedStore


@pytest.mark.parametrize(
    "path", ["/nowhere/at/all", "./nowhere", "../nowhere", "~/nowhere", "a/b/c"]
)
def test_a_path_without_a_model_is_named(path):
    with pytest.raises(ConfigError, match="there is nothing. Name a folder"):
        check_model_path(path)


@pytest.mark.parametrize("path", ["gpt2", "org/model", "s3://bucket/a/model", "dummy"])
def test_what_only_sglang_can_look_up_passes(path):
    check_model_path(path)


def test_a_folder_passes(tmp_path, monkeypatch):
    check_model_path(str(tmp_path))
    monkeypatch.chdir(tmp_path.parent)
    check_model_path(f"./{tmp_path.name}")


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "localhost"])
def test_a_port_in_use_is_named(host):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port} of {host} is in use.*--port"):
            check_port(host, port)
    check_port(host, port)


def test_a_host_that_is_none_is_left_to_sglang():
    check_port("host.invalid", 30000)


def test_a_disk_that_another_server_holds_is_named_with_what_to_do(tmp_path, caplog):
    disk, file = str(tmp_path / "disk"), tmp_path / "store.yaml"
    file.write_text("drain_s: 4\n")
    config = BlendConfig(store_disk_path=disk, store_disk="1GiB", store_config=str(file))
    second = types.SimpleNamespace(
        device="cpu", **{attach.CONFIG.name: config, attach.STORE.name: None}
    )
    options = load_config(None, disk_path=disk, disk_bytes="1GiB", memory_bytes="64MiB")
    with EmbeddedStore(options):
        with pytest.raises(StoreError) as e:
            start_store(second)
    for part in (
        disk,
        "is held by another store",
        "--blend-store-disk-path",
        "--blend-store-endpoint",
    ):
        assert part in str(e.value)
    # What a server that is just ending looks like: said once, and waited for.
    assert sum("waiting up to 4 s" in r.getMessage() for r in caplog.records) == 1


@pytest.mark.parametrize(
    ("given", "resolved", "there"),
    [(None, "cuda", True), ("cuda", "cuda", True), (None, "cpu", False), ("cuda", "cpu", False)],
)
def test_a_store_of_a_server_on_gpus_is_there_from_the_start(monkeypatch, given, resolved, there):
    """SGLang's resolution leaves arguments as they were given, and most servers are given no
    device. Memory that is not all there is not page-locked, and sources come from it slowly."""
    args = ServerArgs(model_path="dummy", device=given)
    args._resolved_overrides = [("platform", {"device": resolved})]
    attach.CONFIG.set(args, BlendConfig(store_memory="64MiB"))
    asked = []

    def started(options, keep):
        asked.append(options)
        return types.SimpleNamespace(endpoint="ipc:///nowhere")

    monkeypatch.setattr("sgl_blend.store.embedded.EmbeddedStore", started)
    start_store(args)
    assert [options.preallocate for options in asked] == [there]


def test_a_store_that_cannot_start_says_why_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    options = load_config(
        None, disk_path=str(tmp_path / "file"), disk_bytes="1GiB", memory_bytes="64MiB"
    )
    with pytest.raises(
        StoreError, match="the chunk store did not start: disk tier at .*cannot be used"
    ):
        EmbeddedStore(options)


@pytest.mark.parametrize(
    ("config", "cause"),
    [
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic NTK"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic NTK"),
        ({"rope_scaling": {"type": "su", "short_factor": [1.0]}}, "longrope"),
        ({"rope_parameters": {"full_attention": {"rope_type": "longrope"}}}, "longrope"),
        ({"dual_chunk_attention_config": {"chunk_size": 262144}}, "dual chunk"),
        ({"attention_chunk_size": 8192}, "attention in chunks of 8192 tokens"),
        ({"index_topk": 2048}, "an indexer chooses"),
        ({"alibi": True}, "ALiBi"),
        ({"position_embedding_type": "alibi"}, "ALiBi"),
        ({"is_encoder_decoder": True}, "an encoder"),
    ],
)
def test_what_a_models_configuration_tells_is_named(config, cause):
    [problem] = model_problems(types.SimpleNamespace(**config))
    assert cause in problem


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"rope_parameters": None, "rope_scaling": None, "is_encoder_decoder": False},
        {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}, "attention_chunk_size": None},
        {"rope_scaling": {"rope_type": "dynamic", "alpha": 1000.0}},
        {"rope_parameters": {"sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    ],
)
def test_what_only_the_loaded_model_tells_passes(config):
    assert model_problems(types.SimpleNamespace(**config)) == []
