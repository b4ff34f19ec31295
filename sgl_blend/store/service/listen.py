"""Where a store listens: its lock, its ROUTER sockets, and the path of its side socket."""

from __future__ import annotations

import fcntl
import os
import secrets
from pathlib import Path
from typing import NamedTuple

import zmq

from sgl_blend.errors import ConfigError
from sgl_blend.folders import check_runtime_folder, runtime_folder
from sgl_blend.store.config import StoreConfig
from sgl_blend.store.wire import protocol as p
from sgl_blend.store.wire.security import Gate, split_endpoint


class Door(NamedTuple):
    """One endpoint. address: as bound. all_admins: every client of this endpoint is an
    administrator."""

    router: zmq.Socket
    address: str
    all_admins: bool


def side_path(config: StoreConfig) -> str:
    """Next to the first ipc:// endpoint, else in the runtime directory by port."""
    for endpoint in config.endpoints:
        scheme, rest = split_endpoint(endpoint)
        if scheme == "ipc":
            return rest + ".shm"
    port = config.endpoints[0].rpartition(":")[2]
    name = port if port.isdigit() and port != "0" else secrets.token_hex(8)
    return f"{runtime_folder()}/sgl-blend-store-{name}.shm"


def lock_address(side: str) -> int:
    """One server for each address: a socket file alone does not tell a live one from a dead.
    Returns the descriptor that holds the lock. Raises ConfigError."""
    try:
        folder = Path(side).parent
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        check_runtime_folder(folder)
        fd = os.open(side + ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(fd)
            raise
    except OSError as e:
        raise ConfigError(f"a store already serves at {side!r}, or it cannot be: {e}") from e
    return fd


def listen(context: zmq.Context, config: StoreConfig) -> tuple[Gate | None, list[Door]]:
    """Bind every endpoint. Raises ConfigError."""
    gate = None
    if config.curve_secret is not None:
        gate = Gate(context, config.curve_secret, config.curve_clients, config.curve_admins)
    doors = []
    for endpoint in config.endpoints:
        router = context.socket(zmq.ROUTER)
        router.linger = 0
        # A reply that cannot be delivered is an error, so that what it grants can be taken back.
        router.router_mandatory = True
        # Bounds what libzmq will allocate for one frame before we have seen it.
        router.maxmsgsize = max(config.max_chunk_bytes, p.MAX_BODY) + 4096
        router.sndhwm = router.rcvhwm = 1000
        scheme, _ = split_endpoint(endpoint)
        if scheme == "tcp" and gate is not None:
            gate.guard(router)
        before = os.umask(0o177)
        try:
            router.bind(endpoint)
        except zmq.ZMQError as e:
            raise ConfigError(f"cannot listen on {endpoint}: {e}") from e
        finally:
            os.umask(before)
        address = router.last_endpoint.decode()
        doors.append(Door(router, address, scheme == "ipc" or config.insecure_admin))
    return gate, doors
