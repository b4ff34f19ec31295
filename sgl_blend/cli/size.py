"""``sgl-blend size``: how much KV a model makes, and how many tokens and documents each tier holds.

    sgl-blend size examples/models/blend-4l --pool 1GiB --store-memory 4GiB
    sgl-blend size meta-llama/Llama-3.1-8B-Instruct --device-memory 80GiB --weights 16GB
    sgl-blend size deepseek-ai/DeepSeek-V3 --tp-size 8 --kv-cache-dtype fp8_e4m3 --documents 100000

The model's configuration alone is read; nothing is loaded, and no device is needed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sgl_blend.cli.kv_size import ITEM_BYTES, KvSize, kv_size, read_config
from sgl_blend.errors import ConfigError
from sgl_blend.option_kinds import parse_size

#: token ids that lie beside each rank's part of a stored token
_TOKEN_ID = 4


@dataclass(frozen=True, slots=True)
class Tier:
    """What one tier holds. token_bytes: of one token there. memory: bytes of it in all. needed: for
    the documents that were asked about (``--documents``)."""

    name: str
    token_bytes: int
    memory: int | None
    tokens: int | None
    documents: int | None
    needed: int | None


def add_parser(subparsers: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Add ``size`` to the command line; the caller dispatches to ``run``."""
    p = subparsers.add_parser(
        "size",
        help="bytes of KV a token takes, and what fits each tier, from a model's config.json",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("model", help="a model's folder, its config.json, or its name on the hub")
    p.add_argument("--tp-size", type=int, default=1, metavar="N", help="ranks (%(default)s)")
    kinds = ", ".join(ITEM_BYTES)
    p.add_argument(
        "--kv-cache-dtype",
        default="auto",
        metavar="DTYPE",
        help=f"auto (the model's own), {kinds}",
    )
    p.add_argument(
        "--document-tokens",
        type=int,
        default=512,
        metavar="N",
        help="tokens of a document (%(default)s)",
    )
    p.add_argument("--documents", type=int, metavar="N", help="say what so many documents need")
    p.add_argument("--pool", type=_size, metavar="SIZE", help="KV pool of each device, as 40GiB")
    p.add_argument(
        "--device-memory",
        type=_size,
        metavar="SIZE",
        help="of each device, instead of --pool: its share for SGLang less the weights",
    )
    p.add_argument(
        "--mem-fraction-static",
        type=float,
        default=0.85,
        metavar="SHARE",
        help="of the device's memory for weights and pool (%(default)s)",
    )
    p.add_argument(
        "--weights",
        type=_size,
        metavar="SIZE",
        help="of the model in all (default: its folder's .safetensors)",
    )
    p.add_argument("--store-memory", type=_size, metavar="SIZE", help="of the chunk store")
    p.add_argument("--store-disk", type=_size, metavar="SIZE", help="of the chunk store")
    p.add_argument("--json", action="store_true", help="as JSON instead of tables")
    p.set_defaults(run=run)
    return p


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except ConfigError as e:
        raise argparse.ArgumentTypeError(str(e)) from None


def run(args: argparse.Namespace) -> int:
    """Exit code 0. Raises ConfigError, UnsupportedError."""
    from sgl_blend.cli.table import Progress

    for name in ("tp_size", "document_tokens", "documents"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} is {value}: it must be at least 1")
    if not 0 < args.mem_fraction_static <= 1:
        raise ConfigError(f"--mem-fraction-static is {args.mem_fraction_static}: 0 to 1 is meant")
    if args.pool and args.device_memory:
        raise ConfigError("--pool and --device-memory say the same: give one of them")
    with Progress() as progress:
        progress("reading the model's configuration")
        config = read_config(args.model)
    size = kv_size(config, args.kv_cache_dtype)
    tiers = tiers_of(size, args)
    name = (config.get("architectures") or [config.get("model_type") or args.model])[0]
    context = config.get("max_position_embeddings")
    if args.json:
        report = {
            "model": name,
            "context": context,
            **asdict(size),
            "tp_size": args.tp_size,
            "kv_heads_of_rank": size.heads_of_rank(args.tp_size),
            "token_bytes_of_rank": size.rank_bytes(args.tp_size),
            "token_bytes": size.server_bytes(args.tp_size),
            "document_tokens": args.document_tokens,
            "tiers": [asdict(t) for t in tiers],
        }
        print(json.dumps(report, indent=1))
    else:
        _print(name, config, size, args, tiers)
    return 0


def tiers_of(size: KvSize, args: argparse.Namespace) -> list[Tier]:
    """The device's pool, the store's memory and disk. Raises ConfigError."""
    tp, needed = args.tp_size, (args.documents or 0) * args.document_tokens
    # Each rank stores its own part, latents one rank for all.
    parts = 1 if size.kind == "MLA" else tp
    stored = size.server_bytes(tp) + _TOKEN_ID * parts

    def tier(name: str, token: int, memory: int | None) -> Tier:
        tokens = None if memory is None else memory // token
        documents = None if tokens is None else tokens // args.document_tokens
        return Tier(name, token, memory, tokens, documents, needed * token if needed else None)

    pool = args.pool
    if args.device_memory:
        pool = _pool(args.device_memory, args)
    where = "device" if tp == 1 else f"each of {tp} devices"
    return [
        tier(where, size.rank_bytes(tp), pool),
        tier("store, memory", stored, args.store_memory),
        tier("store, disk", stored, args.store_disk),
    ]


def _pool(memory: int, args: argparse.Namespace) -> int:
    """What SGLang leaves for the pool: ``--mem-fraction-static`` of the device, less the weights'
    part of a rank."""
    weights = args.weights
    if weights is None:
        files = Path(args.model).expanduser()
        files = files if files.is_dir() else files.parent
        weights = sum(f.stat().st_size for f in files.glob("*.safetensors"))
        if not weights:
            raise ConfigError(
                f"{args.model} has no .safetensors beside it to tell how large the model is: give "
                "--weights, or --pool instead of --device-memory"
            )
    pool = int(memory * args.mem_fraction_static) - weights // args.tp_size
    if pool <= 0:
        raise ConfigError(
            f"{amount(weights // args.tp_size)} of weights do not fit "
            f"{args.mem_fraction_static:g} of {amount(memory)}: nothing is left for the KV pool"
        )
    return pool


def amount(n: float) -> str:
    """Bytes with three digits and a binary unit."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if n < 1024 or unit == "TiB":
            return f"{n:.0f} {unit}" if unit == "B" or n >= 100 else f"{n:.3g} {unit}"
        n /= 1024
    raise AssertionError("unreachable")


def _print(
    name: str, config: Mapping[str, Any], size: KvSize, args: argparse.Namespace, tiers: list[Tier]
) -> None:
    from sgl_blend.cli.table import table

    heads = (
        f"a latent of {size.v_dim} and {size.k_dim} rotated dims for {size.heads} heads"
        if size.kind == "MLA"
        else f"{size.kv_heads} KV heads for {size.heads} heads, {size.k_dim} dims"
        + (f" (V {size.v_dim})" if size.v_dim != size.k_dim else "")
    )
    print(f"{name}: {size.kind}, {size.layers} layers, {heads}, {size.dtype}")
    token = size.server_bytes(args.tp_size)
    text = f"one token: {amount(token)}"
    if args.tp_size > 1:
        held = size.heads_of_rank(args.tp_size)
        text += f", {amount(size.rank_bytes(args.tp_size))} on each of {args.tp_size} ranks"
        if size.kind != "MLA":
            text += f" ({held} KV head{'s' if held > 1 else ''})"
    print(text)
    print(f"a document of {args.document_tokens} tokens: {amount(token * args.document_tokens)}")
    context = config.get("max_position_embeddings")
    if isinstance(context, int):
        print(f"a prompt of {context:,} tokens (the model's longest): {amount(token * context)}")

    def show(value: int | None, form: Any) -> str:
        return "-" if value is None else form(value)

    head = ["tier", "memory", "tokens", "documents"]
    if args.documents:
        head.append(f"{args.documents:,} documents need")
    rows = []
    for t in tiers:
        row = [
            t.name,
            show(t.memory, amount),
            show(t.tokens, "{:,}".format),
            show(t.documents, "{:,}".format),
        ]
        rows.append([*row, show(t.needed, amount)] if args.documents else row)
    print("\n" + table(head, rows))
    if all(t.memory is None for t in tiers) and not args.documents:
        print("\nSay how much there is: --pool or --device-memory, --store-memory, --store-disk.")
