"""What is added to SGLang's HTTP application: the middleware that is every route's way in and out
(``middleware.py``), and a route that SGLang's frontend language expects and no server implements.

``forks.join("concate_and_append")`` in an ``sgl.function`` prefills each fork's text on its own,
joins the texts on the client, and tells the server so (``lang/backend/runtime_endpoint.py:317``,
``lang/interpreter.py:738``, SGLang 0.5.23). There is nothing left to do here: the next request
carries the joined text, and blending finds each fork's KV by its content.
"""

from __future__ import annotations

from typing import Any

PATH = "/concate_and_append_request"


def add_routes() -> None:
    """Add them to SGLang's FastAPI application, once, before it starts."""
    from fastapi import Request
    from fastapi.responses import JSONResponse
    from sglang.srt.entrypoints import http_server
    from starlette.middleware import Middleware

    from sgl_blend.engine.launch.middleware import BlendMiddleware

    app = http_server.app
    if any(getattr(r, "path", None) == PATH for r in app.routes):
        return
    # Innermost: behind SGLang's API keys and decompression, under its metrics.
    app.user_middleware.append(Middleware(BlendMiddleware))

    async def concatenate_and_append(request: Request) -> Any:
        try:
            body = await request.json()
        except ValueError:
            body = None
        if (
            not isinstance(body, dict)
            or not isinstance(body.get("dst_rid"), str)
            or not isinstance(body.get("src_rids"), list)
            or not all(isinstance(r, str) for r in body["src_rids"])
        ):
            message = f"{PATH} takes a JSON object with src_rids (list of texts) and dst_rid (text)"
            return JSONResponse({"error": {"message": message}}, status_code=400)
        return {"success": True}

    # The annotation is a name of this function's scope; FastAPI needs the class itself.
    concatenate_and_append.__annotations__["request"] = Request
    app.post(PATH)(concatenate_and_append)
