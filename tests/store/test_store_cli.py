"""The command line against a store process, and configuration parsing. CPU only."""

from __future__ import annotations

import gc
import json
import socket
import subprocess
import sys

import pytest
from store_testing import NAMESPACE, connect, make_chunk, small_config, start

from sgl_blend.cli.main import main
from sgl_blend.errors import ConfigError, StoreError
from sgl_blend.option_kinds import parse_size
from sgl_blend.store.config import load_config


def _run(*words: str) -> int:
    try:
        return main(list(words))
    except SystemExit as e:  # argparse ends the program
        return e.code


def test_operations_from_the_command_line(tmp_path, capsys):
    made = [make_chunk(i) for i in range(4)]
    with start(small_config(tmp_path)) as store, connect(store.endpoint, NAMESPACE) as client:
        client.put(*zip(*made, strict=True), durable=True)
        client.lookup([made[0][0].key, bytes(16)])
        at = ["--at", store.endpoint, "--namespace", NAMESPACE.hex()]
        keys = [h.key.hex() for h, _ in made]
        assert _run("store", "pin", *at, keys[0]) == 0
        assert "pin: 1 chunks" in capsys.readouterr().out
        assert _run("store", "delete", *at, keys[3]) == 0
        assert _run("store", "delete", *at, keys[3]) == 1
        capsys.readouterr()
        assert _run("inspect", *at, "--json", "--chunks", "10") == 0
        report = json.loads(capsys.readouterr().out)
        assert report["total"] == 3 and report["lookup_hit_rate"] == 0.5
        assert {c["key"] for c in report["chunks"]} == set(keys[:3])
        assert [c["pinned"] for c in report["chunks"] if c["key"] == keys[0]] == [True]
        assert all(c["tiers"] == "memory+disk" for c in report["chunks"])
        assert _run("inspect", *at, "--chunks", "2") == 0
        table = capsys.readouterr().out
        assert "50.0 %" in table and "2 of 3 chunks" in table and "(pinned)" in table
        assert _run("store", "read-only", *at, "on") == 0
        assert _run("store", "clear", *at) == 1
        assert "read-only" in capsys.readouterr().err
        assert _run("store", "read-only", *at, "off") == 0
        assert _run("store", "clear", *at) == 0
        assert "cleared: 2 chunks" in capsys.readouterr().out
        assert _run("store", "unpin", *at, keys[0]) == 0
        capsys.readouterr()
        assert _run("store", "drain", *at, "--stop", "--json") == 0
        assert json.loads(capsys.readouterr().out) == {"verb": "drain", "undone": 0}
        assert store.process.wait(60) == 0


def test_inspect_of_an_absent_store_says_so(tmp_path, capsys):
    assert _run("inspect", "--at", f"ipc://{tmp_path}/no", "--deadline", "0.2") == 1
    assert "no answer" in capsys.readouterr().err
    assert _run("inspect", "--at", f"ipc://{tmp_path}/no", "--namespace", "xy") == 2
    assert "hexadecimal" in capsys.readouterr().err


def test_serving_from_yaml_and_flags(tmp_path):
    (tmp_path / "store.yaml").write_text(
        "memory_bytes: 32MiB\nmax_chunk_bytes: 4MiB\ndisk_bytes: 1GiB\npolicy: lru\n"
    )
    code = (
        "import argparse, sys\n"
        "from sgl_blend.cli import store\n"
        "p = argparse.ArgumentParser(); store.add_parser(p.add_subparsers())\n"
        "a = p.parse_args(sys.argv[1:]); sys.exit(a.run(a))\n"
    )
    address = f"ipc://{tmp_path}/cli-store"
    child = subprocess.Popen(
        [sys.executable, "-c", code, "store", "--config", str(tmp_path / "store.yaml")]
        + ["--endpoint", address, "--disk-path", str(tmp_path / "disk"), "--no-disk-fsync"],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout.readline() == f"ready {address}\n"
    with connect(address, NAMESPACE) as client:
        header, body = make_chunk(1)
        assert client.put([header], [body]) == ["stored"]
        assert client.stats()["memory_limit"] == 32 << 20
    child.terminate()
    assert child.wait(60) == 0
    child.stdout.close()
    assert len(list((tmp_path / "disk" / "data").glob("*/*"))) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--endpoint", "http://x"], "neither ipc:// nor"),
        (["--endpoint", "tcp://0.0.0.0:0"], "keygen"),
        (["--policy", "lfru"], "did you mean 'lru'"),
        (["--memory-bytes", "many"], "not a number of bytes"),
        (["--low-watermark", "0.99"], "above high_watermark"),
        (["--remote", "moncake"], "did you mean 'mooncake'"),
        (["--remote-options", "[1]"], "JSON object"),
        (["--config", "/nonexistent.yaml"], "nonexistent"),
    ],
)
def test_wrong_options_are_one_clear_line(words, message, capsys):
    assert _run("store", *words) == 2
    err = capsys.readouterr().err
    assert message.replace("ipc:// nor", "ipc://PATH nor") in err and err.count("\n") == 1


def test_a_metrics_port_that_is_taken_is_one_clear_line(tmp_path, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        words = ["--endpoint", f"ipc://{tmp_path}/store", "--metrics-port", str(port)]
        assert _run("store", *words) == 2
        err = capsys.readouterr().err
        assert f"127.0.0.1:{port} (Address already in use)" in err and err.count("\n") == 1
        assert gc.isenabled()
        with pytest.raises(StoreError, match=f"did not start: .*metrics_port is {port}"):
            start(small_config(metrics_port=port))


def test_yaml_keys_are_checked(tmp_path):
    path = tmp_path / "s.yaml"
    path.write_text("memory_byte: 1GiB\n")
    with pytest.raises(ConfigError, match="did you mean 'memory_bytes'"):
        load_config(path)
    path.write_text("- a\n")
    with pytest.raises(ConfigError, match="must be a mapping"):
        load_config(path)
    path.write_text("read_only: 3\n")
    with pytest.raises(ConfigError, match="expected bool"):
        load_config(path)
    path.write_text("remote_options: {rpc_port: 5, host: a}\nendpoints: ipc:///x\nlease_s: 5\n")
    config = load_config(path, lease_s=None, memory_bytes="1.5GiB")
    assert config.remote_options == (("host", "a"), ("rpc_port", 5))
    assert (config.endpoints, config.lease_s) == (("ipc:///x",), 5.0)
    assert config.memory_bytes == 3 << 29


def test_sizes():
    assert parse_size("4GiB") == 4 << 30 and parse_size("10 MB") == 10_000_000
    assert parse_size(7) == 7 and parse_size("8k") == 8000
    with pytest.raises(ConfigError):
        parse_size("4 GiBit")
