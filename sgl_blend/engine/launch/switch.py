"""Switching blending on in the launching process: what is checked, and which hooks are installed.

Three ways lead here: the flag ``--enable-blend`` (``flags.py``), ``SGL_BLEND_ENABLE=1`` under
``sglang.Engine`` (:func:`resolve_once`), and ``sgl_blend.Engine`` (``offline.py``).
"""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, NoReturn

from sgl_blend import attach
from sgl_blend.config import BLEND, ENV_ENABLE, BlendConfig
from sgl_blend.engine.launch.disaggregation import DECODE, PREFILL, is_decode_node
from sgl_blend.engine.launch.say import say
from sgl_blend.errors import BlendError, ConfigError
from sgl_blend.option_kinds import truth

if TYPE_CHECKING:
    from sglang.srt.server_args import ServerArgs

BACKEND = "blend"


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
    name, text = BLEND.variables(os.environ).get("ENABLE", (ENV_ENABLE, ""))
    try:
        return bool(text.strip()) and truth(text)
    except ValueError:
        raise ConfigError(f"{name} is {text!r}: expected 1 or 0") from None


def refuse(error: BlendError) -> NoReturn:
    """End the launch with one line and status 2."""
    print(f"sgl-blend: error: {error}", file=sys.stderr, flush=True)
    sys.exit(2)


def switch_on(server_args: ServerArgs, config: BlendConfig) -> None:
    """Verify SGLang, put ``config`` on ``server_args`` and install the launch-time hooks.

    Raises :class:`SeamError` or :class:`ConfigError`.
    """
    from sgl_blend.engine import seams
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
    if server_args.disaggregation_mode == "prefill":
        say(PREFILL, server_args)
    attach.CONFIG.set(server_args, config)
    hook_resolution()
    hook_requests()


def hook_requests() -> None:
    """The hooks of a process that takes requests and answers them. Without ``report`` no scheduler
    sends one."""
    from sgl_blend.engine import seams
    from sgl_blend.engine.request.options import validate_request
    from sgl_blend.engine.request.report import show_report, take_report

    _install_once(seams.VALIDATE_REQUEST, validate_request, "around")
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


def _resolve(original: Callable[..., None], server_args: ServerArgs) -> None:
    """SGLang's own resolution. What it cannot read is one line on a command line."""
    try:
        original(server_args)
    except OSError as e:
        if not attach.COMMAND_LINE.get(server_args):
            raise
        reason = " ".join(str(e).split())
        raise ConfigError(f"--model-path {server_args.model_path} cannot be read: {reason}") from e


def resolve_once(original: Callable[..., None], server_args: ServerArgs) -> None:
    """AROUND ``ServerArgs.resolve_once``; in place while blending may be switched on.

    ``sglang.Engine(...)`` builds its arguments without a command line: under
    ``SGL_BLEND_ENABLE=1`` they get their configuration here. Children receive resolved ones.
    """
    from sgl_blend.engine.launch.cpu import choose_early

    if not getattr(server_args, "_resolution_finished", False):
        wanted = attach.CONFIG.get(server_args) is None and enabled_by_environment()
        if wanted and is_decode_node(server_args):
            say(DECODE, server_args)
        elif wanted:
            config = BLEND.load()
            server_args.radix_cache_backend = claim_radix_cache(server_args.radix_cache_backend)
            switch_on(server_args, config)
    if attach.CONFIG.get(server_args) is None:
        original(server_args)
        return
    from sgl_blend.engine.launch import one_pool
    from sgl_blend.engine.launch.checks import (
        check_arguments,
        check_model_path,
        check_options,
        check_port,
    )
    from sgl_blend.engine.launch.families import check_family
    from sgl_blend.engine.launch.frontends import prepare
    from sgl_blend.engine.launch.kept_route import check_readers
    from sgl_blend.engine.launch.own_store import start_store

    unset = False
    first = attach.LAUNCH.get(server_args) is None
    try:
        if not getattr(server_args, "_resolution_finished", False):
            check_model_path(server_args.model_path)
            # Before SGLang finds other faults in what cannot be had anyway.
            check_options(server_args)
            check_readers(server_args)
            if attach.COMMAND_LINE.get(server_args) and server_args.node_rank == 0:
                check_port(server_args.host, server_args.port)
            check_family(server_args)
            choose_early(server_args)
            unset = one_pool.ask(server_args)
        _resolve(original, server_args)
        one_pool.settle(server_args, unset)
        check_arguments(server_args)
        if first:
            attach.LAUNCH.set(server_args, secrets.token_hex(16))
        start_store(server_args)
    except BlendError as e:
        if attach.COMMAND_LINE.get(server_args):
            refuse(e)
        raise
    prepare(server_args, first)
