"""``sgl-blend store``: run a store, make its keys, and operate a running one.

Without a verb it serves. ``keygen`` needs no store; the other verbs talk to the one ``--at``. They
are for administrators: over ``ipc://`` the store's own user, over ``tcp://`` whoever has a key of
the store's ``--curve-admins`` (``--curve-client`` names the secret one).
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import fields

from sgl_blend.errors import BlendError, ConfigError

_CONFIG_HELP = {
    "endpoints": "where to listen; repeat for several (ipc://PATH or tcp://HOST:PORT)",
    "memory_bytes": "bound of shared memory, for example 16GiB",
    "policy": "eviction from memory: tinylfu or lru",
    "high_watermark": "share of memory above which it is evicted in the background",
    "low_watermark": "share of memory it is then evicted down to",
    "max_copies": "copies of the same tokens computed after different contexts",
    "max_chunk_bytes": "largest chunk that is taken",
    "disk_path": "directory of the disk tier (none without)",
    "disk_bytes": "bound of the disk tier",
    "disk_policy": "eviction from disk: tinylfu or lru",
    "disk_serde": "form on disk: raw, int8, fp8 or cachegen",
    "disk_fsync": "sync each file before it counts as durable",
    "disk_after": "how often a chunk is asked for before it is written to disk",
    "disk_readers": "threads that read from disk",
    "remote": "shared tier: mooncake or hicache",
    "remote_options": "options of the shared tier, as a JSON object",
    "remote_serde": "form in the shared tier: raw, int8, fp8 or cachegen",
    "remote_deadline_s": "longest that one operation of the shared tier may take",
    "lease_s": "lifetime of leases of clients without shared memory",
    "client_lease_bytes": "most memory that one client may hold leased (0: half)",
    "read_only": "refuse stores and deletes",
    "insecure_tcp": "serve tcp:// beyond loopback without keys",
    "curve_secret": "the store's secret key file (see keygen)",
    "curve_clients": "directory of public keys of admitted clients (none: any with our public key)",
    "curve_admins": "directory of public keys of clients that may pin, delete, clear, drain, inspect",
    "insecure_admin": "let every tcp:// client do so, without a key",
    "metrics_port": "port of the Prometheus metrics (0: none)",
    "metrics_host": "address of the Prometheus metrics",
    "drain_s": "longest that stopping waits for the disk",
}
_FLAGS = ("disk_fsync", "read_only", "insecure_tcp", "insecure_admin")
_NUMBERS = {
    "max_copies": int,
    "disk_after": int,
    "disk_readers": int,
    "metrics_port": int,
    "high_watermark": float,
    "low_watermark": float,
    "remote_deadline_s": float,
    "lease_s": float,
    "drain_s": float,
}


def add_parser(subparsers) -> argparse.ArgumentParser:
    """Add ``store`` to the command line; the caller dispatches to ``run``."""
    parser = subparsers.add_parser(
        "store", help="run a chunk store, or operate a running one", description=__doc__
    )
    parser.add_argument("--config", metavar="YAML", help="options from a file; flags override it")
    parser.add_argument("--parent-fd", type=int, help=argparse.SUPPRESS)
    for name, text in _CONFIG_HELP.items():
        flag = "--" + name.replace("_", "-")
        if name == "endpoints":
            parser.add_argument(
                "--endpoint", dest=name, action="append", metavar="ADDRESS", help=text
            )
        elif name in _FLAGS:
            parser.add_argument(
                flag, action=argparse.BooleanOptionalAction, default=None, help=text
            )
        else:
            parser.add_argument(flag, type=_NUMBERS.get(name, str), metavar="X", help=text)
    verbs = parser.add_subparsers(dest="verb", metavar="VERB")
    keygen = verbs.add_parser(
        "keygen", help="make CURVE keys for store, clients and administrators"
    )
    keygen.add_argument("folder")
    for verb, text in (
        ("pin", "keep chunks from being evicted"),
        ("unpin", "let chunks be evicted again"),
        ("delete", "remove chunks"),
    ):
        sub = _client_verb(verbs, verb, text)
        sub.add_argument("keys", nargs="+", metavar="KEY", help="content keys, hexadecimal")
    clear = _client_verb(verbs, "clear", "remove a namespace's chunks; pinned ones stay")
    clear.add_argument("--all", action="store_true", help="of every namespace")
    drain = _client_verb(verbs, "drain", "refuse stores, write everything to disk")
    drain.add_argument("--stop", action="store_true", help="and end the store")
    read_only = _client_verb(verbs, "read-only", "refuse stores and deletes from now on")
    read_only.add_argument("state", choices=("on", "off"))
    parser.set_defaults(run=run)
    return parser


def _client_verb(verbs, name: str, text: str) -> argparse.ArgumentParser:
    parser = verbs.add_parser(name, help=text)
    add_client_options(parser)
    return parser


def add_client_options(parser: argparse.ArgumentParser) -> None:
    """Options of every command that talks to a running store."""
    parser.add_argument("--at", metavar="ADDRESS", help="the store's address (default: the usual)")
    parser.add_argument(
        "--namespace", default="00" * 16, metavar="HEX", help="32 hexadecimal digits"
    )
    parser.add_argument("--curve-client", metavar="FILE", help="the client's secret key file")
    parser.add_argument("--curve-server", metavar="FILE", help="the store's public key file")
    parser.add_argument("--deadline", type=float, default=10.0, metavar="SECONDS")


def open_client(args: argparse.Namespace):
    """A ``StoreClient`` as those options say. Raises ConfigError."""
    from sgl_blend.store.config import default_endpoint
    from sgl_blend.store.wire.client import StoreClient
    from sgl_blend.store.wire.security import load_client_keys

    curve = None
    if bool(args.curve_client) != bool(args.curve_server):
        raise ConfigError("--curve-client and --curve-server go together")
    if args.curve_client:
        curve = load_client_keys(args.curve_client, args.curve_server)
    return StoreClient(
        args.at or default_endpoint(),
        _hex(args.namespace, "namespace", 16),
        curve=curve,
        shm=False,
        deadline_s=args.deadline,
        name="command line",
    )


def _hex(text: str, what: str, size: int | None = None) -> bytes:
    try:
        raw = bytes.fromhex(text)
    except ValueError as e:
        raise ConfigError(f"{what} {text!r} is not hexadecimal") from e
    if size is not None and len(raw) != size:
        raise ConfigError(f"{what} {text!r} is {len(raw)} bytes, {size} expected")
    return raw


def run(args: argparse.Namespace) -> int:
    """Exit code: 0 done, 1 the store did not answer or refused, 2 wrong options."""
    try:
        if args.verb is None:
            return _serve(args)
        if args.verb == "keygen":
            from sgl_blend.store.wire.security import make_keys

            for path in make_keys(args.folder):
                print(path)
            return 0
        return _operate(args)
    except ConfigError as e:
        print(f"sgl-blend store: {e}", file=sys.stderr)
        return 2
    except BlendError as e:
        print(f"sgl-blend store: {e}", file=sys.stderr)
        return 1


def config_from(args: argparse.Namespace):
    """``StoreConfig`` from ``--config`` and the flags given. Raises ConfigError."""
    from sgl_blend.store.config import StoreConfig, load_config

    given = {f.name: getattr(args, f.name, None) for f in fields(StoreConfig)}
    if given["remote_options"] is not None:
        try:
            given["remote_options"] = json.loads(given["remote_options"])
        except json.JSONDecodeError as e:
            raise ConfigError(f"--remote-options is not JSON: {e}") from e
        if not isinstance(given["remote_options"], dict):
            raise ConfigError("--remote-options is not a JSON object")
    return load_config(args.config, **given)


def _serve(args: argparse.Namespace) -> int:
    import logging

    from sgl_blend.store.service.server import StoreServer

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    config = config_from(args)
    server = StoreServer(config, args.parent_fd)
    server.install_signals()
    if config.metrics_port:
        from sgl_blend.store.service.metrics import serve_metrics

        serve_metrics(server, config.metrics_host, config.metrics_port)
    print("ready", *server.addresses, flush=True)
    return server.run()


def _operate(args: argparse.Namespace) -> int:
    with open_client(args) as client:
        if args.verb in ("pin", "unpin", "delete"):
            keys = [_hex(k, "key") for k in args.keys]
            if args.verb == "delete":
                count = client.delete(keys)
            else:
                count = client.pin(keys, args.verb == "pin")
            print(f"{args.verb}: {count} chunks")
            return 0 if count else 1
        if args.verb == "clear":
            print(f"cleared: {client.clear(everything=args.all)} chunks")
        elif args.verb == "drain":
            left = client.drain(stop=args.stop, deadline_s=max(60.0, args.deadline))
            print(f"drained; {left} writes left undone")
            return 0 if left == 0 else 1
        else:
            client.set_read_only(args.state == "on")
            print(f"read-only: {args.state}")
    return 0
