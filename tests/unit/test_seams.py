"""Every SGLang symbol that the package imports, overrides or inherits is checked at launch. CPU.

The source is read with ``ast``, so a new import or override that ``engine/sglang_symbols.py`` does
not name fails here. ``store/`` is left out: it runs without SGLang, and its HiCache adapter looks
for its symbols when that tier is configured.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from sgl_blend.engine import seams
from sgl_blend.engine.sglang_symbols import OVERRIDDEN, USED
from sgl_blend.errors import SeamError

ROOT = Path(__file__).resolve().parents[2] / "sgl_blend"
FILES = [p for p in sorted(ROOT.rglob("*.py")) if "store" not in p.relative_to(ROOT).parts]
NAMED = {*seams.HOOKS, *USED, *OVERRIDDEN}


def _for_types_only(tree: ast.Module) -> set[int]:
    """Nodes under ``if TYPE_CHECKING:``."""
    guards = [
        n
        for n in ast.walk(tree)
        if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.unparse(n.test)
    ]
    return {id(n) for guard in guards for n in ast.walk(guard)}


def imported() -> set[str]:
    """``sglang.srt.x.Y`` for each ``from sglang.srt.x import Y``."""
    out = set()
    for path in FILES:
        tree = ast.parse(path.read_text())
        unused = _for_types_only(tree)
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sglang"):
                if id(node) not in unused:
                    out |= {f"{node.module}.{alias.name}" for alias in node.names}
    return out


def _classes() -> Iterator[tuple[type, ast.ClassDef]]:
    """Our classes that have one of SGLang's above them."""
    for path in FILES:
        tree = ast.parse(path.read_text())
        module = ".".join(path.with_suffix("").relative_to(ROOT.parent).parts)
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and node.bases:
                kind = getattr(importlib.import_module(module), node.name)
                if any(c.__module__.startswith("sglang.") for c in kind.__mro__):
                    yield kind, node


def _home(kind: type, name: str) -> str | None:
    """Where SGLang defines ``name`` above ``kind``."""
    for c in kind.__mro__:
        if c.__module__.startswith("sglang.") and callable(vars(c).get(name)):
            return f"{c.__module__}.{c.__qualname__}.{name}"
    return None


def overridden() -> set[str]:
    """Methods that our classes define and SGLang's above them do too."""
    return {
        home
        for kind, node in _classes()
        for each in node.body
        if isinstance(each, ast.FunctionDef) and not each.name.startswith("__")
        if (home := _home(kind, each.name))
    }


def inherited() -> set[str]:
    """Methods of SGLang's that ours call as ``self.x`` or ``super().x``, and do not override."""
    out = set()
    for kind, node in _classes():
        for each in ast.walk(node):
            if isinstance(each, ast.Attribute) and ast.unparse(each.value) in ("self", "super()"):
                own = next((c for c in kind.__mro__ if each.attr in vars(c)), None)
                upper = ast.unparse(each.value) == "super()"
                if own is not None and (upper or own.__module__.startswith("sglang.")):
                    home = _home(kind, each.attr)
                    if home and not each.attr.startswith("__"):
                        out.add(home)
    return out


def test_the_search_finds_what_is_there():
    cache = "sglang.srt.mem_cache.radix_cache.RadixCache."
    assert {cache + "match_prefix", cache + "_split_node"} <= overridden()
    assert {cache + "_insert_helper", cache + "_match_prefix_helper"} <= inherited()
    assert "sglang.srt.mem_cache.events.KVCacheEventRecorder" in imported()


@pytest.mark.parametrize("name", sorted(imported() | inherited()))
def test_every_symbol_that_is_imported_or_inherited_is_checked_at_launch(name):
    assert name in NAMED


@pytest.mark.parametrize("name", sorted(overridden()))
def test_every_override_is_checked_with_its_parameters(name):
    assert name in OVERRIDDEN


def test_nothing_is_checked_that_nobody_overrides():
    assert set(OVERRIDDEN) == overridden()


def test_this_sglang_has_them_all():
    seams.verify()


CACHE = "sglang.srt.mem_cache.radix_cache.RadixCache"


@pytest.mark.parametrize(
    "name",
    [
        f"{CACHE}._insert_helper",
        f"{CACHE}._match_prefix_helper",
        f"{CACHE}._split_node",
        "sglang.srt.mem_cache.radix_cache.RadixKey.child_key_at",
        "sglang.srt.mem_cache.events.KVCacheEventRecorder.record_store",
        "sglang.srt.mem_cache.allocator.base.BaseTokenToKVPoolAllocator.free_segment",
    ],
)
def test_a_missing_symbol_is_one_clear_error(monkeypatch, name):
    owner, _, attribute = name.rpartition(".")
    monkeypatch.delattr(pkgutil.resolve_name(owner), attribute)
    with pytest.raises(SeamError) as e:
        seams.verify()
    assert f"lacks {name} " in str(e.value)


def test_a_changed_signature_is_one_clear_error(monkeypatch):
    def _split_node(self, key, child, split_len, extra): ...

    monkeypatch.setattr(pkgutil.resolve_name(CACHE), "_split_node", _split_node)
    with pytest.raises(SeamError) as e:
        seams.verify()
    assert f"{CACHE}._split_node takes (self, key, child, split_len, extra)" in str(e.value)
    assert "overrides (self, key, child, split_len)" in str(e.value)


@pytest.mark.parametrize("name", sorted(OVERRIDDEN))
def test_our_override_takes_what_sglangs_takes(name):
    """By the same names, or by ``*args`` and ``**kwargs``."""
    theirs = inspect.signature(pkgutil.resolve_name(name)).parameters
    short = name.rpartition(".")[2]
    for kind, node in _classes():
        if _home(kind, short) == name and any(getattr(n, "name", "") == short for n in node.body):
            ours = inspect.signature(vars(kind)[short]).parameters
            kinds = {p.kind for p in ours.values()}
            variable = {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD} <= kinds
            assert variable or list(ours) == list(theirs)
