"""``GET /blend_explain?id=ID``: what became of a request that is over, for ``sgl-blend explain``.

The answer holds a prompt and the beginning of its answer, whosever they are: it is for those who
have SGLang's ``--admin-api-key`` alone. SGLang checks keys in a middleware, which it does not
install with several tokenizer workers (0.5.23): so the route checks, too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sgl_blend import attach
from sgl_blend.engine.request.kept import ask_kept
from sgl_blend.errors import ConfigError

if TYPE_CHECKING:
    from sglang.srt.server_args import ServerArgs

PATH = "/blend_explain"


def add_kept_route() -> None:
    """Add the route to SGLang's FastAPI application, once, before it starts."""
    from fastapi import Request
    from fastapi.responses import JSONResponse
    from sglang.srt.entrypoints import http_server
    from sglang.srt.utils.auth import AuthLevel, auth_level

    app = http_server.app
    if any(getattr(r, "path", None) == PATH for r in app.routes):
        return

    @auth_level(AuthLevel.ADMIN_OPTIONAL)
    async def blend_explain(request: Request) -> Any:
        manager = http_server.get_global_state().tokenizer_manager
        said = request.headers.get("authorization")
        status, body = await explained(manager, request.query_params.get("id"), said)
        return JSONResponse(body, status_code=status)

    # The annotation is a name of this function's scope; FastAPI needs the class itself.
    blend_explain.__annotations__["request"] = Request
    app.get(PATH)(blend_explain)


async def explained(manager: Any, rid: str | None, authorization: str | None) -> tuple[int, Any]:
    """Status and JSON of the answer. manager: SGLang's ``TokenizerManager``."""
    from sglang.srt.utils.auth import AuthLevel, decide_request_auth

    args = manager.server_args
    last = attach.CONFIG.get(args).explain_last
    if not last:
        return _error(
            404,
            "this server keeps no requests: launch it with --blend-explain-last N and "
            "--admin-api-key to have the last N blended ones explained",
        )
    decision = decide_request_auth(
        method="GET",
        path=PATH,
        authorization_header=authorization,
        api_key=args.api_key,
        admin_api_key=args.admin_api_key,
        auth_level=AuthLevel.ADMIN_FORCE,
    )
    if not decision.allowed:
        status = decision.error_status_code
        return _error(status, f"{PATH} is for those who have the server's --admin-api-key")
    if not rid:
        return _error(400, f"{PATH}?id=ID takes the id of a request (meta_info.id)")
    told = await ask_kept(manager, rid)
    if told is None:
        return _error(
            404,
            f"no request {rid!r} is kept: it was not blended, it was sent to another server, or "
            f"{last} others have been blended since (--blend-explain-last {last})",
        )
    return 200, told


def _error(status: int, message: str) -> tuple[int, Any]:
    return status, {"error": {"message": message}}


def check_readers(server_args: ServerArgs) -> None:
    """Raise :class:`ConfigError` where requests would be kept that nobody may read, or can."""
    from sglang.srt.environ import envs

    last = attach.CONFIG.get(server_args).explain_last
    if last and envs.SGLANG_RUST_SERVER.get():
        raise ConfigError(
            f"--blend-explain-last {last}: SGLANG_RUST_SERVER serves no {PATH} to read what is "
            "kept. Unset one of them"
        )
    if last and not server_args.admin_api_key:
        raise ConfigError(
            f"--blend-explain-last {last} keeps prompts of all clients: give --admin-api-key too, "
            "for those who may read them"
        )
