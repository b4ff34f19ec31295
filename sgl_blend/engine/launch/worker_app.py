"""The application that each worker of ``--tokenizer-worker-num`` serves: SGLang's, with our hooks.

The workers are processes of their own, which import the application by its name
(``SGLANG_HTTP_SERVER_APP_PATH``, SGLang 0.5.23) and load no plugins. Their configuration comes with
the server's arguments.
"""

from __future__ import annotations

from sglang.srt.entrypoints.http_server import app

from sgl_blend.engine.launch.info import add_info
from sgl_blend.engine.launch.kept_route import add_kept_route
from sgl_blend.engine.launch.routes import add_routes
from sgl_blend.engine.launch.switch import hook_requests

__all__ = ["app"]

hook_requests()
add_routes()
add_info()
add_kept_route()
