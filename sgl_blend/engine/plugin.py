"""Entry point of the plugin group ``sglang.srt.plugins`` (SGLang 0.5.23).

Seams touched in every process: ``ServerArgs.add_cli_args`` and ``from_cli_args`` (our flags),
``register_radix_cache_backend`` (the name ``blend``). Nothing else, unless ``--enable-blend`` is
given (or ``SGL_BLEND_ENABLE=1``, which also hooks ``ServerArgs.resolve_once`` for the sake of
``sglang.Engine``): then ``launch/switch.py`` hooks request validation in the HTTP process, and
``wiring.py`` hooks the forward path in each scheduler process.
"""

from __future__ import annotations


def register() -> None:
    """Called by SGLang's ``load_plugins()`` in each of its processes."""
    from sglang.srt.mem_cache.registry import (
        register_radix_cache_backend,
        registered_radix_cache_backends,
    )
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from sgl_blend.engine import seams
    from sgl_blend.engine.launch import flags, switch
    from sgl_blend.errors import ConfigError

    HookRegistry.register(seams.SERVER_ARGS_ADD, flags.add_cli_args, HookType.AFTER)
    HookRegistry.register(seams.SERVER_ARGS_FROM, flags.from_cli_args, HookType.AROUND)
    if switch.BACKEND not in registered_radix_cache_backends():
        register_radix_cache_backend(switch.BACKEND, _build_tree)
    try:
        by_environment = switch.enabled_by_environment()
    except ConfigError:
        # SGLang would swallow it here; the hook says it where it ends the launch.
        by_environment = True
    if by_environment:
        switch.hook_resolution()


def _build_tree(ctx):
    from sgl_blend.engine.wiring import build_tree

    return build_tree(ctx)
