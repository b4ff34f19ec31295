"""``sgl-blend store``: run a store, make its keys, and operate a running one.

Without a verb it serves. ``keygen`` needs no store; the other verbs talk to the one ``--at``. They
are for administrators: over ``ipc://`` the store's own user, over ``tcp://`` the holder of a key of
the store's ``--curve-admins`` (``--curve-client`` names the secret one).
"""

from __future__ import annotations

import argparse
import json

from sgl_blend.errors import ConfigError
from sgl_blend.folders import check_runtime_folder, runtime_folder
from sgl_blend.store.config import STORE, StoreConfig, default_endpoint


def add_parser(subparsers) -> argparse.ArgumentParser:
    """Add ``store`` to the command line; the caller dispatches to ``run``."""
    parser = subparsers.add_parser(
        "store", help="run a chunk store, or operate a running one", description=__doc__
    )
    parser.add_argument("--config", metavar="YAML", help="options from a file; flags override it")
    parser.add_argument("--parent-fd", type=int, help=argparse.SUPPRESS)
    STORE.add_flags(parser)
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
    parser.add_argument("--json", action="store_true", help="the answer as JSON")
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
    from sgl_blend.store.wire.client import StoreClient
    from sgl_blend.store.wire.security import load_client_keys

    curve = None
    if bool(args.curve_client) != bool(args.curve_server):
        raise ConfigError("--curve-client and --curve-server go together")
    if args.curve_client:
        curve = load_client_keys(args.curve_client, args.curve_server)
    if not args.at:
        check_runtime_folder(runtime_folder())
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
    """Exit code: 0 done, 1 nothing was changed. Raises BlendError."""
    if args.verb is None:
        return _serve(args)
    if args.verb == "keygen":
        from sgl_blend.store.wire.security import make_keys

        for path in make_keys(args.folder):
            print(path)
        return 0
    return _operate(args)


def config_from(args: argparse.Namespace) -> StoreConfig:
    """From flags, environment and ``--config``. Raises ConfigError."""
    return STORE.load(STORE.given(args), path=args.config)


def _serve(args: argparse.Namespace) -> int:
    import logging

    from sgl_blend.store.service.process import open_store, serve

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    server = open_store(config_from(args), args.parent_fd)
    print("ready", *server.addresses, flush=True)
    return serve(server)


def _operate(args: argparse.Namespace) -> int:
    from sgl_blend.cli.table import Progress

    with open_client(args) as client:
        if args.verb in ("pin", "unpin", "delete"):
            keys = [_hex(k, "key") for k in args.keys]
            if args.verb == "delete":
                count = client.delete(keys)
            else:
                count = client.pin(keys, args.verb == "pin")
            _say(args, f"{args.verb}: {count} chunks", chunks=count)
            return 0 if count else 1
        if args.verb == "clear":
            count = client.clear(everything=args.all)
            _say(args, f"cleared: {count} chunks", chunks=count)
        elif args.verb == "drain":
            with Progress() as progress:
                progress("the store writes what it holds to its disk")
                left = client.drain(stop=args.stop, deadline_s=max(60.0, args.deadline))
            _say(args, f"drained; {left} writes left undone", undone=left)
            return 0 if left == 0 else 1
        else:
            client.set_read_only(args.state == "on")
            _say(args, f"read-only: {args.state}", state=args.state)
    return 0


def _say(args: argparse.Namespace, text: str, **facts: object) -> None:
    """The text, or what it says as JSON."""
    print(json.dumps({"verb": args.verb, **facts}) if args.json else text)
