"""Who may use the administrative verbs: real sockets, real CURVE keys, the command line. CPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
from store_testing import NAMESPACE, connect, make_chunk, small_config, start

from sgl_blend.cli.main import main
from sgl_blend.errors import ConfigError
from sgl_blend.store.config import StoreConfig
from sgl_blend.store.errors import StoreRefused, StoreTimeout
from sgl_blend.store.wire import protocol as p
from sgl_blend.store.wire.security import load_client_keys, load_public_keys, make_keys

ADMINISTRATIVE = {
    "pin": lambda c, key: c.pin([key]),
    "unpin": lambda c, key: c.pin([key], False),
    "delete": lambda c, key: c.delete([key]),
    "clear": lambda c, key: c.clear(),
    "clear everything": lambda c, key: c.clear(everything=True),
    "list everything": lambda c, key: c.list(everything=True),
    "list a prefix": lambda c, key: c.call(p.List(c.namespace[:3]))[0],
    "stats": lambda c, key: c.stats(),
    "drain": lambda c, key: c.drain(),
    "read only": lambda c, key: (c.set_read_only(True), c.set_read_only(False)),
}


def _use(client, seed: int) -> bytes:
    """What any client may do; returns the key that it stored."""
    header, body = make_chunk(seed)
    assert client.put([header], [body]) == ["stored"]
    assert client.lookup([header.key])[0] is not None
    with client.load([header.key]) as (chunk,):
        assert chunk.buf.tobytes() == body.tobytes()
    assert header in [e.header for e in client.list().entries]
    return header.key


def _refused(client, key: bytes) -> None:
    for name, verb in ADMINISTRATIVE.items():
        with pytest.raises(StoreRefused, match="administrators") as caught:
            verb(client, key)
        assert caught.value.code == "forbidden", name
    # And nothing came of it.
    assert client.lookup([key])[0] is not None
    assert not next(e for e in client.list().entries if e.header.key == key).pinned


def _allowed(client, key: bytes) -> None:
    assert client.pin([key]) == 1
    assert client.list(everything=True).total >= 1
    assert client.pin([key], False) == 1
    assert client.stats()["chunks"] >= 1
    client.set_read_only(True)
    client.set_read_only(False)
    assert client.drain() == 0
    assert client.delete([key]) == 1
    assert client.clear(everything=True) >= 0


def test_without_keys_local_clients_are_administrators(tmp_path):
    config = replace(small_config(), endpoints=("tcp://127.0.0.1:0", f"ipc://{tmp_path}/s"))
    with start(config, private=False) as store:
        tcp, ipc = store.addresses
        with connect(tcp, NAMESPACE, shm=False) as far:
            key = _use(far, 1)
            _refused(far, key)
            for shm in (True, False):
                with connect(ipc, NAMESPACE, shm=shm) as near:
                    _allowed(near, _use(near, 2))
            # Over tcp too, where the side socket has proved whose process it is.
            with connect(tcp, NAMESPACE) as near:
                _allowed(near, _use(near, 3))
                assert near.shm
        with connect(ipc, NAMESPACE) as near:
            assert near.stats()["counters"]["forbidden"] == len(ADMINISTRATIVE)


@pytest.mark.parametrize("insecure_admin", [False, True])
def test_open_tcp_needs_a_flag_of_its_own(tmp_path, insecure_admin):
    config = small_config(insecure_tcp=True, insecure_admin=insecure_admin)
    config = replace(config, endpoints=("tcp://0.0.0.0:0", f"ipc://{tmp_path}/s"))
    with start(config, private=False) as store:
        address = store.addresses[0].replace("0.0.0.0", "127.0.0.1")
        with connect(address, NAMESPACE, shm=False) as client:
            (_allowed if insecure_admin else _refused)(client, _use(client, 1))


@pytest.mark.parametrize("any_client", [False, True])
def test_keys_tell_administrators_from_clients(tmp_path, capsys, any_client):
    keys = tmp_path / "keys"
    make_keys(keys)
    make_keys(tmp_path / "strangers")
    config = small_config(
        curve_secret=str(keys / "server.key_secret"),
        curve_clients=None if any_client else str(keys / "clients"),
        curve_admins=str(keys / "admins"),
    )
    config = replace(config, endpoints=("tcp://0.0.0.0:0", f"ipc://{tmp_path}/s"))
    with start(config, private=False) as store:
        address = store.addresses[0].replace("0.0.0.0", "127.0.0.1")

        def curve(who):
            return load_client_keys(who, keys / "server.key")

        plain = keys / "clients" / "client.key_secret"
        admin = keys / "admins" / "admin.key_secret"
        with connect(address, NAMESPACE, curve=curve(plain), shm=False) as client:
            key = _use(client, 1)
            _refused(client, key)
            # An administrator's presence lends nothing to others.
            with connect(address, NAMESPACE, curve=curve(admin), shm=False) as boss:
                _allowed(boss, _use(boss, 2))
                key = _use(client, 3)
                _refused(client, key)
        stranger = curve(tmp_path / "strangers" / "admins" / "admin.key_secret")
        with connect(address, NAMESPACE, curve=stranger, shm=False, deadline_s=0.7) as client:
            if any_client:
                _refused(client, key)
            else:
                with pytest.raises(StoreTimeout):
                    client.lookup([key])

        # The same from the command line.
        at = ["--at", address, "--curve-server", str(keys / "server.key")]
        pin = ["store", "pin", *at, "--namespace", NAMESPACE.hex()]
        assert main([*pin, "--curve-client", str(plain), key.hex()]) == 1
        assert "forbidden: Pin is for administrators" in capsys.readouterr().err
        assert main([*pin, "--curve-client", str(admin), key.hex()]) == 0
        assert "pin: 1 chunks" in capsys.readouterr().out
        assert main(["inspect", *at, "--curve-client", str(plain)]) == 1
        assert "forbidden" in capsys.readouterr().err
        assert main(["inspect", *at, "--curve-client", str(admin), "--json"]) == 0


def test_key_lists_need_keys(tmp_path):
    for name in ("curve_clients", "curve_admins"):
        with pytest.raises(ConfigError, match="needs curve_secret"):
            StoreConfig(**{name: str(tmp_path)})
    with pytest.raises(ConfigError, match="holds no .key file"):
        load_public_keys(tmp_path)
    made = make_keys(tmp_path / "keys")
    assert len(load_public_keys(tmp_path / "keys" / "admins")) == 1
    assert all(path.stat().st_mode & 0o077 == 0 for path in made if path.suffix == ".key_secret")
