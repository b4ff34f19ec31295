"""``sgl_blend.Engine``: SGLang's offline engine with blending on.

``sglang.Engine(**kwargs)`` knows no command line, so blend options come as keywords here. Seams
(SGLang 0.5.23): ``Engine(server_args=...)`` takes ready arguments
(``entrypoints/engine.py:290``), and its children get them pickled.
"""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from sgl_blend.config import BLEND
from sgl_blend.engine.launch.disaggregation import DECODE, is_decode_node
from sgl_blend.errors import ConfigError, unknown_name

if TYPE_CHECKING:
    from sglang.srt.entrypoints.engine import Engine as SglangEngine

    from sgl_blend.config import BlendConfig

logger = logging.getLogger(__name__)

PREFIX = "blend_"


def Engine(
    *, enable_blend: bool = True, blend_config: str | None = None, **kwargs: Any
) -> SglangEngine:
    """A ``sglang.Engine`` that blends.

    ``blend_config``: path of a YAML file. ``blend_<option>``: an option of
    :class:`~sgl_blend.config.BlendConfig` (``blend_policy="hkvd"``); keyword over environment
    over file over default. Other keywords are SGLang's. ``enable_blend=False`` gives SGLang's
    plain engine and takes no blend options.

    Raises :class:`ConfigError`, :class:`UnsupportedError` or :class:`SeamError` before any
    process is started, except for what only the loaded model shows.
    """
    options, rest = {}, {}
    for key, value in kwargs.items():
        if key.startswith(PREFIX):
            options[key[len(PREFIX) :]] = value
        else:
            rest[key] = value
    names = [o.name for o in BLEND.options]
    for name in options:
        if name not in names:
            known = [PREFIX + n for n in names]
            raise ConfigError(unknown_name("keyword", PREFIX + name, known))
    if not enable_blend:
        if options or blend_config:
            given = PREFIX + next(iter(options)) if options else "blend_config"
            raise ConfigError(f"{given} is given with enable_blend=False")
        import sglang

        return sglang.Engine(**rest)
    if "server_args" in rest:
        raise ConfigError("sgl_blend.Engine builds server_args itself; pass its fields as keywords")
    return _blend_engine(BLEND.load(options, path=blend_config), rest)


def _blend_engine(config: BlendConfig, kwargs: dict[str, Any]) -> SglangEngine:
    from sglang.srt.entrypoints.engine import Engine as SglangEngine
    from sglang.srt.plugins import load_plugins

    from sgl_blend.engine.launch.switch import claim_radix_cache, switch_on

    # Registers the radix cache backend; SGLang's own constructor does this too late for attach().
    load_plugins()
    kwargs = {"log_level": "error", **kwargs}
    if is_decode_node(SimpleNamespace(**kwargs)):
        logger.info("sgl-blend: %s", DECODE)
        return SglangEngine(**kwargs)
    kwargs["radix_cache_backend"] = claim_radix_cache(kwargs.get("radix_cache_backend"))
    server_args = SglangEngine.server_args_class(**kwargs)
    switch_on(server_args, config)
    server_args.resolve_once()
    return SglangEngine(server_args=server_args)
