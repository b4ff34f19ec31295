"""Writes the tables of ``docs/reference.md`` that follow from declarations in the code.

    python .ci/reference.py            write them
    python .ci/reference.py --check    exit 1 where a committed table is not current

A table stands between ``<!-- begin NAME (generated) -->`` and ``<!-- end NAME -->``; everything
around it is written by hand. Needs the package's light modules only: neither torch nor SGLang.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "reference.md"
sys.path.insert(0, str(ROOT))

from sgl_blend.config import BLEND  # noqa: E402
from sgl_blend.options import OptionSet, markdown_table  # noqa: E402
from sgl_blend.store.config import STORE  # noqa: E402
from sgl_blend.variables import READ_BESIDE  # noqa: E402


def variables() -> str:
    """Variables that are no options: ours, then those of others that are read."""

    def ours(options: OptionSet) -> list[tuple[str, str]]:
        return [(options.prefixes[-1] + name, text) for name, text in options.others.items()]

    rows = [*ours(BLEND), *ours(STORE), *READ_BESIDE.items()]
    return markdown_table(("variable", "meaning"), [(f"`{name}`", text) for name, text in rows])


TABLES: dict[str, Callable[[], str]] = {
    "blend options": BLEND.markdown,
    "store options": STORE.markdown,
    "variables": variables,
}


def rendered(page: str) -> str:
    """``page`` with each table as the code has it now. Raises ``ValueError`` for a missing one."""
    for name, table in TABLES.items():
        begin, end = f"<!-- begin {name} (generated) -->", f"<!-- end {name} -->"
        block = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.S)
        if len(block.findall(page)) != 1:
            raise ValueError(f"{PAGE.name} must hold {begin} and {end} once")
        page = block.sub(lambda _, t=table, b=begin, e=end: f"{b}\n{t()}{e}", page)
    return page


def main() -> int:
    page = PAGE.read_text()
    now = rendered(page)
    if "--check" in sys.argv[1:]:
        if now != page:
            print("docs/reference.md is not current: run python .ci/reference.py", file=sys.stderr)
            return 1
        return 0
    PAGE.write_text(now)
    return 0


if __name__ == "__main__":
    sys.exit(main())
