"""Links and file names in the documentation: the file exists, and so does the heading. CPU."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
#: a code span that names a file by its path
_NAMED = re.compile(r"`([\w.*-]+/[\w./*-]*\.(?:py|md|txt|json|cpp|h))`")
#: folders that such a path may start from
_BASES = (ROOT, ROOT / "sgl_blend", ROOT / "sgl_blend" / "store")
_FENCE = re.compile(r"^```.*?^```", re.M | re.S)


def pages() -> list[Path]:
    skip = {".venv", ".git", "build", ".pytest_cache"}
    found = [p for p in ROOT.rglob("*.md") if not skip & set(p.relative_to(ROOT).parts)]
    return sorted(found)


def anchors(page: Path) -> set[str]:
    """The anchors GitHub gives to a page's headings."""
    text = _FENCE.sub("", page.read_text())
    out = set()
    for heading in re.findall(r"^#+ (.+)$", text, re.M):
        plain = re.sub(r"[^\w\- ]", "", heading.lower())
        out.add(plain.replace(" ", "-"))
    return out


def broken(page: Path) -> list[str]:
    """Links of ``page`` that lead nowhere."""
    found = []
    for link in _LINK.findall(_FENCE.sub("", page.read_text())):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists():
            found.append(link)
        elif anchor and target.suffix == ".md" and anchor not in anchors(target):
            found.append(link)
    return found


def missing(page: Path) -> set[str]:
    """Files that ``page`` names by a path and that are not there."""
    named = set(_NAMED.findall(_FENCE.sub("", page.read_text())))
    return {n for n in named if not any(any(b.glob(n)) for b in (*_BASES, page.parent))}


@pytest.mark.parametrize("page", pages(), ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    assert broken(page) == []


@pytest.mark.parametrize("page", pages(), ids=lambda p: str(p.relative_to(ROOT)))
def test_named_files_exist(page):
    assert missing(page) == set()


def test_files_that_the_code_speaks_of_exist():
    """In docstrings and comments: a test or a page that was moved is named where it is now."""
    named = re.compile(r"``?((?:tests|docs|examples|sgl_blend)/[\w./*-]*\.(?:py|md|json|cpp|h))`")
    gone = [
        (str(file.relative_to(ROOT)), name)
        for folder in ("sgl_blend", "tests", "examples")
        for file in (ROOT / folder).rglob("*.py")
        for name in named.findall(file.read_text())
        if not any(ROOT.glob(name))
    ]
    assert gone == []


def test_broken_links_are_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# A b: `c`\n\n[good](#a-b-c) [web](https://x.org) [gone](gone.md) [no](page.md#d)\n"
        "```\n[code](not-a-link)\n```\n"
    )
    assert broken(page) == ["gone.md", "page.md#d"]
    page.write_text("`engine/gone.py` `store/tiers/hicache*.py` `.ci/imports.py` `gone.py`\n")
    assert missing(page) == {"engine/gone.py"}
