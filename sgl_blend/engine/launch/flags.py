"""Command line flags, and what ``--enable-blend`` sets in motion in the launching process."""

from __future__ import annotations

import argparse
import os
import sys
import time
from typing import Any, NoReturn

from sgl_blend import attach
from sgl_blend import config as cfg
from sgl_blend.config import BlendConfig
from sgl_blend.errors import BlendError, ConfigError, StoreError

BACKEND = "blend"


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
    try:
        enabled = getattr(args, "enable_blend", False) or enabled_by_environment()
    except ConfigError as e:
        refuse(e)
    if not enabled:
        given = [_flag(k) for k, v in flags.items() if v is not None]
        given += ["--blend-config"] if path else []
        if given:
            refuse(ConfigError(f"{given[0]} is given without --enable-blend"))
        return original(cls, args)
    try:
        config = cfg.load_config(flags, path=path)
        args.radix_cache_backend = claim_radix_cache(getattr(args, "radix_cache_backend", None))
        server_args = original(cls, args)
        switch_on(server_args, config)
        attach.COMMAND_LINE.set(server_args, True)
    except BlendError as e:
        refuse(e)
    return server_args


def resolve_once(original, server_args: Any) -> None:
    """AROUND ``ServerArgs.resolve_once``; in place while blending may be switched on.

    ``sglang.Engine(...)`` builds its arguments without a command line: under
    ``SGL_BLEND_ENABLE=1`` they get their configuration here. Children receive resolved ones.
    """
    from sgl_blend.engine.launch.cpu import choose_early

    if not getattr(server_args, "_resolution_finished", False):
        if attach.CONFIG.get(server_args) is None and enabled_by_environment():
            config = cfg.load_config()
            server_args.radix_cache_backend = claim_radix_cache(server_args.radix_cache_backend)
            switch_on(server_args, config)
        if attach.CONFIG.get(server_args) is not None:
            choose_early(server_args)
    original(server_args)
    if attach.CONFIG.get(server_args) is None:
        return
    from sgl_blend.engine.launch.checks import check_arguments

    try:
        check_arguments(server_args)
        start_store(server_args)
    except BlendError as e:
        if attach.COMMAND_LINE.get(server_args):
            refuse(e)
        raise
    if attach.COMMAND_LINE.get(server_args):
        from sgl_blend.engine.launch.routes import add_routes

        add_routes()


#: stores that this process has started; each ends with the process, however that ends
_stores: list[Any] = []


def start_store(server_args: Any) -> None:
    """Start the server's own chunk store, unless it has one, is told of another, or wants none.

    Raises :class:`StoreError` when it does not start, :class:`ConfigError` for its options.
    """
    config: BlendConfig = attach.CONFIG.get(server_args)
    if "store" not in config.tiers or config.store_endpoint:
        return
    if attach.STORE.get(server_args) is not None:
        return
    from sgl_blend.host_memory import available_memory
    from sgl_blend.store.config import load_config
    from sgl_blend.store.embedded import EmbeddedStore

    memory: str | int = config.store_memory
    if memory == "auto":
        memory = min(16 << 30, max(256 << 20, available_memory() // 16))
    given = {"memory_bytes": memory}
    if config.store_disk_path:
        given |= {"disk_path": config.store_disk_path, "disk_bytes": config.store_disk}
    options = load_config(config.store_config or None, **given)
    # A server that was ended a moment ago may still be writing to the same disk.
    patience = time.monotonic() + (options.drain_s if options.disk_path else 0.0)
    while True:
        try:
            store = EmbeddedStore(options, keep=True)
            break
        except StoreError:
            if time.monotonic() > patience:
                raise
            time.sleep(0.5)
    _stores.append(store)
    attach.STORE.set(server_args, store.endpoint)


def claim_radix_cache(given: str | None) -> str:
    """The name of our radix cache backend; raises :class:`ConfigError` where another is given."""
    if given not in (None, BACKEND):
        raise ConfigError(
            f"--enable-blend brings its own radix cache; --radix-cache-backend {given} cannot be "
            "used beside it"
        )
    return BACKEND


def enabled_by_environment() -> bool:
    """Is ``SGL_BLEND_ENABLE`` set? Raises :class:`ConfigError` where it is no truth value."""
    name, text = cfg.variables(os.environ).get("ENABLE", (cfg.ENV_ENABLE, ""))
    text = text.strip().lower()
    if text in ("", "0", "false", "no", "off"):
        return False
    if text in ("1", "true", "yes", "on"):
        return True
    raise ConfigError(f"{name} is {text!r}: expected 1 or 0")


def refuse(error: BlendError) -> NoReturn:
    """End the launch with one line and status 2."""
    print(f"sgl-blend: error: {error}", file=sys.stderr, flush=True)
    sys.exit(2)


def switch_on(server_args: Any, config: BlendConfig) -> None:
    """Verify SGLang, put ``config`` on ``server_args`` and install the launch-time hooks.

    Raises :class:`SeamError` or :class:`ConfigError`.
    """
    from sgl_blend.engine import seams
    from sgl_blend.engine.request.options import validate_request
    from sgl_blend.engine.request.report import show_report, take_report
    from sgl_blend.gate.prompts import read_prompts
    from sgl_blend.selection import POLICIES, Need

    if POLICIES.get(config.policy).need is Need.NOTHING and config.coverage:
        raise ConfigError(
            f"blend option coverage is {config.coverage}: policy {config.policy!r} has no score "
            "to cover; leave coverage at 0"
        )
    if config.gate_prompts:
        read_prompts(config.gate_prompts)
    seams.verify()
    attach.CONFIG.set(server_args, config)
    hook_resolution()
    _install_once(seams.VALIDATE_REQUEST, validate_request, "around")
    if config.report:
        _install_once(seams.UPDATE_META_INFO, take_report, "around")
        _install_once(seams.WAIT_ONE_RESPONSE, show_report, "around")


def hook_resolution() -> None:
    """Install :func:`resolve_once`."""
    from sgl_blend.engine import seams

    _install_once(seams.SERVER_ARGS_RESOLVE, resolve_once, "around")


_installed: set[str] = set()


def _install_once(target: str, hook, kind: str = "after") -> None:
    from sgl_blend.engine import seams

    if target not in _installed:
        seams.install(target, hook, kind)
        _installed.add(target)
