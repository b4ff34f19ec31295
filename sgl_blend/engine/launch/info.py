"""``GET /blend_info``: which options a server blends with, and where its store is.

For those who operate it: ``sgl-blend top`` and ``doctor`` find the server's own store by it. SGLang
guards it by the API key, as all its routes.
"""

from __future__ import annotations

from dataclasses import asdict
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from sgl_blend import attach

if TYPE_CHECKING:
    from sglang.srt.server_args import ServerArgs

PATH = "/blend_info"


def add_info() -> None:
    """Add the route to SGLang's FastAPI application, once, before it starts."""
    from sglang.srt.entrypoints import http_server

    app = http_server.app
    if any(getattr(r, "path", None) == PATH for r in app.routes):
        return

    async def blend_info() -> dict[str, Any]:
        return about(http_server.get_global_state().tokenizer_manager.server_args)

    app.get(PATH)(blend_info)


def about(server_args: ServerArgs) -> dict[str, Any]:
    """version: of sgl-blend. options: all, as they are in force. store: address of the chunk store
    that the server uses, None where it uses none."""
    config = attach.CONFIG.get(server_args)
    store = config.store_endpoint or attach.STORE.get(server_args)
    return {
        "version": version("sgl-blend"),
        "options": asdict(config),
        "store": store if "store" in config.tiers else None,
    }
