"""``sgl-blend inspect``: what a running store holds, how full it is, how often it is hit."""

from __future__ import annotations

import argparse
import json

from sgl_blend.cli.store import add_client_options, open_client


def add_parser(subparsers) -> argparse.ArgumentParser:
    """Add ``inspect`` to the command line; the caller dispatches to ``run``."""
    parser = subparsers.add_parser(
        "inspect", help="what a store holds, hit rates, sizes", description=__doc__
    )
    add_client_options(parser)
    parser.add_argument("--chunks", type=int, default=0, metavar="N", help="list N chunks as well")
    parser.add_argument("--offset", type=int, default=0, help="first chunk to list")
    parser.add_argument("--all", action="store_true", help="list chunks of every namespace")
    parser.add_argument("--json", action="store_true", help="as JSON instead of a table")
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> int:
    """Exit code 0. Raises BlendError."""
    report = _gather(args)
    if args.json:
        print(json.dumps(report, indent=2))
    else:
        _print_table(report)
    return 0


def _gather(args: argparse.Namespace) -> dict:
    with open_client(args) as client:
        stats = client.stats()
        counters = stats["counters"]
        report = {
            "endpoint": client.endpoint,
            "stats": stats,
            "lookup_hit_rate": _share(
                counters.get("lookup_hits", 0), counters.get("lookup_keys", 0)
            ),
            "load_hit_rate": _share(
                counters.get("load_hits", 0),
                counters.get("load_hits", 0) + counters.get("load_misses", 0),
            ),
        }
        if args.chunks > 0:
            listing = client.list(args.offset, min(args.chunks, 4096), everything=args.all)
            report["total"] = listing.total
            report["chunks"] = [
                {
                    "namespace": e.header.namespace.hex(),
                    "key": e.header.key.hex(),
                    "tokens": e.header.n_tokens,
                    "start": e.header.start,
                    "bytes": e.header.body_bytes,
                    "dtype": e.header.dtype,
                    "layers": e.header.layout.n_layers,
                    "generation": e.header.generation,
                    "serde": e.header.serde,
                    "tiers": e.tiers,
                    "pinned": e.pinned,
                }
                for e in listing.entries
            ]
        return report


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _mib(n: int) -> str:
    return f"{n / 2**20:,.1f} MiB"


def _percent(share: float | None) -> str:
    return "none yet" if share is None else f"{100 * share:.1f} %"


def _print_table(report: dict) -> None:
    stats, counters = report["stats"], report["stats"]["counters"]
    state = "read-only" if stats["read_only"] else "draining" if stats["draining"] else "serving"
    rows = [
        ("store", f"{report['endpoint']} ({state})"),
        ("chunks", f"{stats['chunks']:,} ({stats['memory_chunks']:,} in memory)"),
        ("memory", f"{_mib(stats['memory_used'])} of {_mib(stats['memory_limit'])}"),
        ("disk", f"{_mib(stats['disk_used'])} of {_mib(stats['disk_limit'])}"),
        ("lookup hits", _percent(report["lookup_hit_rate"])),
        ("load hits", _percent(report["load_hit_rate"])),
        ("loaded", _mib(counters.get("load_bytes", 0))),
        (
            "evictions",
            f"{stats['memory_evictions']:,} memory, {counters.get('disk_evictions', 0):,} disk",
        ),
        ("damaged chunks", f"{counters.get('corrupt', 0):,}"),
        ("leases, backlog", f"{stats['leases']:,}, {stats['backlog']:,}"),
    ]
    for name, value in rows:
        print(f"{name:<16}{value}")
    if "chunks" in report:
        print(f"\n{'key':<18}{'tokens':>8}{'start':>9}{'size':>13}{'gen':>5}  {'form':<9}tiers")
        for c in report["chunks"]:
            mark = " (pinned)" if c["pinned"] else ""
            print(
                f"{c['key'][:16]:<18}{c['tokens']:>8}{c['start']:>9}{_mib(c['bytes']):>13}"
                f"{c['generation']:>5}  {c['serde']:<9}{c['tiers']}{mark}"
            )
        print(f"{len(report['chunks'])} of {report['total']} chunks")
