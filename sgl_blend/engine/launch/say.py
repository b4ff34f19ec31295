"""Lines to the operator during a launch."""

from __future__ import annotations

import logging
import sys
from typing import Any

from sgl_blend import attach

logger = logging.getLogger(__name__)


def say(line: str, server_args: Any) -> None:
    """SGLang sets up logging after its command line is read, and a launch that fails until then
    should have said it: there it goes to standard error, elsewhere to the log."""
    if attach.COMMAND_LINE.get(server_args):
        print(f"sgl-blend: {line}", file=sys.stderr, flush=True)
    else:
        logger.info("sgl-blend: %s", line)
