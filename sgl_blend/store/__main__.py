"""``python -m sgl_blend.store``: a store whose configuration comes on standard input, as JSON.

For ``EmbeddedStore`` and tests; people use ``sgl-blend store``. Prints ``ready ADDRESS...`` once
it listens, or ``failed REASON``.
"""

from __future__ import annotations

import argparse
import logging
import select
import shutil
import sys

from sgl_blend.errors import BlendError
from sgl_blend.store.embedded import decode_config
from sgl_blend.store.service.process import open_store, serve


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m sgl_blend.store")
    parser.add_argument("--parent-fd", type=int, default=None)
    parser.add_argument("--folder", help="removed when the store ends after its parent")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    try:
        server = open_store(decode_config(sys.stdin.buffer.read()), args.parent_fd)
    except BlendError as e:
        print("failed", e, flush=True)
        return 2
    print("ready", *server.addresses, flush=True)
    code = serve(server)
    if args.folder and select.select([args.parent_fd], [], [], 0)[0]:
        shutil.rmtree(args.folder, ignore_errors=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
