"""Command line flags of the server: declared by ``config.BLEND``, read into a ``BlendConfig``."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from sgl_blend import attach
from sgl_blend.config import BLEND
from sgl_blend.engine.launch.disaggregation import DECODE, is_decode_node
from sgl_blend.engine.launch.switch import (
    claim_radix_cache,
    enabled_by_environment,
    refuse,
    switch_on,
)
from sgl_blend.errors import BlendError, ConfigError

#: what the options' names begin with in the parsed arguments
_DEST = "blend_"


def add_cli_args(result: Any, parser: argparse.ArgumentParser) -> None:
    """AFTER ``ServerArgs.add_cli_args``: one flag for each option."""
    group = parser.add_argument_group("blend", "non-prefix KV reuse (sgl-blend)")
    group.add_argument(
        "--enable-blend",
        action="store_true",
        help="Reuse the KV cache of documents wherever they appear in a prompt (sgl-blend).",
    )
    group.add_argument(
        "--blend-config", type=str, default=None, help="YAML file with blend options."
    )
    BLEND.add_flags(group, dest=_DEST)


def from_cli_args(original, cls, args: argparse.Namespace):
    """AROUND ``ServerArgs.from_cli_args``: build the configuration and switch blending on.

    What does not fit is printed as one line, and the launch ends with status 2: an exception
    here would be a traceback, and one in the plugin function SGLang would swallow.
    """
    flags = BLEND.given(args, dest=_DEST)
    path = getattr(args, "blend_config", None)
    try:
        enabled = getattr(args, "enable_blend", False) or enabled_by_environment()
    except ConfigError as e:
        refuse(e)
    if not enabled:
        given = [BLEND.flag_of(BLEND[k]) for k, v in flags.items() if v is not None]
        given += ["--blend-config"] if path else []
        if given:
            refuse(ConfigError(f"{given[0]} is given without --enable-blend"))
        return original(cls, args)
    try:
        config = BLEND.load(flags, path=path)
        if is_decode_node(args):
            print(f"sgl-blend: {DECODE}", file=sys.stderr, flush=True)
            return original(cls, args)
        args.radix_cache_backend = claim_radix_cache(getattr(args, "radix_cache_backend", None))
        server_args = original(cls, args)
        attach.COMMAND_LINE.set(server_args, True)
        switch_on(server_args, config)
    except BlendError as e:
        refuse(e)
    return server_args
