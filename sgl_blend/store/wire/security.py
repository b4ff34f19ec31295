"""Who may talk to the store and who may administer it, by address and by CURVE key.

``ipc://`` is guarded by file permissions. ``tcp://`` on a loopback address is open to the machine.
Any other ``tcp://`` address needs CURVE keys (``sgl-blend store keygen``), or an explicit flag.

Administrators may pin, delete, clear, drain and see everything. They are the clients that come
over ``ipc://`` or prove by the side socket to be the store's own user, those with a key of
``curve_admins`` over ``tcp://``, and under the flag ``insecure_admin`` all clients.
"""

from __future__ import annotations

import ipaddress
import os
from dataclasses import dataclass
from pathlib import Path

from sgl_blend.errors import ConfigError


@dataclass(frozen=True)
class CurveClient:
    """What a client needs: its own key pair and the server's public key (Z85 bytes)."""

    public: bytes
    secret: bytes
    server: bytes


class Gate:
    """A server's side of CURVE: who may connect, and who of them is an administrator.

    secret: the server's secret key file. clients, admins: directories of public keys; without
    ``clients`` all may connect that know the server's key. Raises ConfigError.
    """

    def __init__(self, context, secret: str, clients: str | None, admins: str | None):
        from zmq.auth.thread import ThreadAuthenticator

        self._pair = load_pair(secret)
        self._admins = load_public_keys(admins) if admins else frozenset()
        self._admitted = load_public_keys(clients) | self._admins if clients else None
        self._auth = ThreadAuthenticator(context)
        self._auth.start()
        self._auth.configure_curve_callback("*", self)

    def callback(self, _domain: str, key: bytes) -> bool:
        """pyzmq's question: may this public key (Z85) connect?"""
        return self._admitted is None or key in self._admitted

    def guard(self, socket) -> None:
        """Before it is bound: admit only who has the keys."""
        socket.curve_publickey, socket.curve_secretkey = self._pair
        socket.curve_server = True

    def is_admin(self, frame) -> bool:
        """Whether a message came over a connection opened with an administrator's key."""
        import zmq

        if not self._admins:
            return False
        try:
            # As pyzmq's authenticator names a connection: its public key, Z85.
            return frame.get("User-Id").encode() in self._admins
        except zmq.ZMQError:
            return False

    def stop(self) -> None:
        self._auth.stop()


def split_endpoint(endpoint: str) -> tuple[str, str]:
    """(scheme, rest). Raises ConfigError unless it is ipc:// or tcp://."""
    scheme, mark, rest = endpoint.partition("://")
    if scheme not in ("ipc", "tcp") or not mark or not rest:
        raise ConfigError(f"endpoint {endpoint!r} is neither ipc://PATH nor tcp://HOST:PORT")
    if scheme == "tcp" and not rest.rpartition(":")[0]:
        raise ConfigError(f"endpoint {endpoint!r} has no port; write tcp://HOST:PORT")
    return scheme, rest


def is_loopback(endpoint: str) -> bool:
    """Whether a tcp:// endpoint can be reached from this machine alone."""
    host = split_endpoint(endpoint)[1].rpartition(":")[0].strip("[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_endpoints(endpoints: tuple[str, ...], has_keys: bool, insecure: bool) -> None:
    """Raises ConfigError for an address beyond loopback with neither keys nor the flag."""
    for endpoint in endpoints:
        scheme, _ = split_endpoint(endpoint)
        if scheme == "tcp" and not is_loopback(endpoint) and not has_keys and not insecure:
            raise ConfigError(
                f"{endpoint} can be reached from other machines: make keys with "
                "'sgl-blend store keygen DIR' and pass --curve-secret, or accept anyone "
                "with --insecure-tcp"
            )


def make_keys(folder: str | Path) -> list[Path]:
    """Write key pairs of the server, a client and an administrator; secrets are mode 0600.

    ``FOLDER/clients`` and ``FOLDER/admins`` are what ``curve_clients`` and ``curve_admins`` name,
    once the ``.key_secret`` files have moved to their owners.

    Raises ConfigError when keys are already there: they are never overwritten.
    """
    import zmq.auth

    folder = Path(folder)
    made = []
    places = ((folder, "server"), (folder / "clients", "client"), (folder / "admins", "admin"))
    for where, name in places:
        where.mkdir(parents=True, exist_ok=True, mode=0o700)
        secret = where / f"{name}.key_secret"
        if secret.exists():
            raise ConfigError(f"{secret} exists; remove it first if it is to be replaced")
        before = os.umask(0o177)
        try:
            made += map(Path, zmq.auth.create_certificates(where, name))
        finally:
            os.umask(before)
    return made


def load_client_keys(client_secret: str | Path, server_public: str | Path) -> CurveClient:
    """From ``client.key_secret`` and ``server.key``. Raises ConfigError."""
    public, secret = load_pair(client_secret)
    return CurveClient(public, secret, _load(server_public)[0])


def load_public_keys(folder: str | Path) -> frozenset[bytes]:
    """The public keys (Z85) of all ``.key`` files of a directory. Raises ConfigError."""
    try:
        files = sorted(Path(folder).glob("*.key"))
    except OSError as e:
        raise ConfigError(f"key directory {str(folder)!r}: {e}") from e
    if not files:
        raise ConfigError(f"key directory {str(folder)!r} holds no .key file")
    return frozenset(_load(f)[0] for f in files)


def load_pair(secret_file: str | Path) -> tuple[bytes, bytes]:
    """(public, secret) of a secret key file. Raises ConfigError."""
    public, secret = _load(secret_file)
    if secret is None:
        raise ConfigError(f"{str(secret_file)!r} holds no secret key; give the .key_secret file")
    return public, secret


def _load(path: str | Path) -> tuple[bytes, bytes | None]:
    import zmq.auth

    try:
        return zmq.auth.load_certificate(path)
    except (OSError, ValueError) as e:
        raise ConfigError(f"key file {str(path)!r}: {e}") from e
