"""The processes that take a server's requests: SGLang's HTTP application in the launching process,
several tokenizer workers, or the embedded Rust server (SGLang 0.5.23)."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from sgl_blend import attach
from sgl_blend.engine.launch.say import say

if TYPE_CHECKING:
    from sglang.srt.server_args import ServerArgs

#: the application that tokenizer workers import, as ``module:name``
APP_PATH = "SGLANG_HTTP_SERVER_APP_PATH"
WORKER_MODULE = "sgl_blend.engine.launch.worker_app"
OWN_APP = (
    f"{APP_PATH} names an application of its own: import {WORKER_MODULE} in that module, or its "
    "workers read no x-blend header, check no options and show no report"
)
RUST = (
    "SGLANG_RUST_SERVER takes requests without Python: custom_params is obeyed, but malformed "
    "options get full prefill in place of a 400, the header x-blend is not read, and answers show "
    "no report. Unset it for those"
)


def prepare(server_args: ServerArgs, first: bool) -> None:
    """Call in the launching process after each resolution. first: of this server; what there is to
    say is said then."""
    from sglang.srt.environ import envs

    if envs.SGLANG_RUST_SERVER.get():
        if first:
            say(RUST, server_args)
        return
    if server_args.tokenizer_worker_num > 1:
        given = os.environ.get(APP_PATH)
        if given in (None, f"{WORKER_MODULE}:app"):
            os.environ[APP_PATH] = f"{WORKER_MODULE}:app"
        elif first:
            say(OWN_APP, server_args)
    # A program may serve HTTP too; one that only has an engine need not load the application.
    loaded = "sglang.srt.entrypoints.http_server" in sys.modules
    if attach.COMMAND_LINE.get(server_args) or loaded:
        from sgl_blend.engine.launch.info import add_info
        from sgl_blend.engine.launch.kept_route import add_kept_route
        from sgl_blend.engine.launch.routes import add_routes

        add_routes()
        add_info()
        add_kept_route()
