"""Command line flags, and what ``--enable-blend`` sets in motion in the launching process."""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

from sgl_blend import config as cfg
from sgl_blend.config import BlendConfig
from sgl_blend.errors import BlendError, ConfigError

#: attribute under which the configuration travels to the scheduler processes; the underscore
#: passes ServerArgs' seal on public names (``server_args.py``, 0.5.23)
CONFIG_ATTR = "_blend_config"
#: set where the launching process serves HTTP (``launch_server``, not ``Engine``)
SERVES_HTTP_ATTR = "_blend_serves_http"


def _flag(name: str) -> str:
    return "--blend-" + name.replace("_", "-")


def _typed(name: str):
    def parse(text: str) -> Any:
        try:
            return cfg.parse_text(name, text)
        except ConfigError as e:
            raise argparse.ArgumentTypeError(str(e)) from None

    return parse


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
    for f in cfg.option_fields():
        group.add_argument(
            _flag(f.name),
            dest=f"blend_{f.name}",
            type=_typed(f.name),
            default=None,
            help=f"{f.metadata['help']} (default: {f.default!r})".replace("%", "%%"),
        )


def from_cli_args(original, cls, args: argparse.Namespace):
    """AROUND ``ServerArgs.from_cli_args``: build the configuration and switch blending on.

    What does not fit is printed as one line, and the launch ends with status 2: an exception
    here would be a traceback, and one in the plugin function SGLang would swallow.
    """
    flags = {f.name: getattr(args, f"blend_{f.name}", None) for f in cfg.option_fields()}
    path = getattr(args, "blend_config", None)
    enabled = getattr(args, "enable_blend", False) or _enabled_by_environment()
    if not enabled:
        given = [_flag(k) for k, v in flags.items() if v is not None]
        given += ["--blend-config"] if path else []
        if given:
            _refuse(ConfigError(f"{given[0]} is given without --enable-blend"))
        return original(cls, args)
    try:
        config = cfg.load_config(flags, path=path)
        if getattr(args, "radix_cache_backend", None) not in (None, "blend"):
            raise ConfigError(
                f"--enable-blend brings its own radix cache; --radix-cache-backend "
                f"{args.radix_cache_backend} cannot be used beside it"
            )
        args.radix_cache_backend = "blend"
        server_args = original(cls, args)
        attach(server_args, config)
        setattr(server_args, SERVES_HTTP_ATTR, True)
    except BlendError as e:
        _refuse(e)
    return server_args


def _enabled_by_environment() -> bool:
    text = os.environ.get(cfg.ENV_ENABLE, "").strip().lower()
    if text in ("", "0", "false", "no", "off"):
        return False
    if text in ("1", "true", "yes", "on"):
        return True
    _refuse(ConfigError(f"{cfg.ENV_ENABLE} is {text!r}: expected 1 or 0"))
    raise AssertionError("unreachable")


def _refuse(error: BlendError) -> None:
    print(f"sgl-blend: error: {error}", file=sys.stderr, flush=True)
    sys.exit(2)


def attach(server_args: Any, config: BlendConfig) -> None:
    """Verify SGLang, put ``config`` on ``server_args`` and install the launch-time hooks.

    Raises :class:`SeamError` or :class:`ConfigError`.
    """
    from sgl_blend.engine import checks, seams
    from sgl_blend.engine.options import validate_request
    from sgl_blend.engine.report import update_meta_info
    from sgl_blend.selection import POLICIES

    POLICIES.get(config.policy)
    seams.verify()
    setattr(server_args, CONFIG_ATTR, config)
    _install_once(seams.SERVER_ARGS_RESOLVE, checks.after_resolve)
    _install_once(seams.VALIDATE_REQUEST, validate_request)
    if config.report:
        _install_once(seams.UPDATE_META_INFO, update_meta_info, "around")


_installed: set[str] = set()


def _install_once(target: str, hook, kind: str = "after") -> None:
    from sgl_blend.engine import seams

    if target not in _installed:
        seams.install(target, hook, kind)
        _installed.add(target)
