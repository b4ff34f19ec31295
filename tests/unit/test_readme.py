"""The README against the code: what it lists is what there is. Runs on CPU."""

import re
from pathlib import Path

from sgl_blend.cli.main import COMMANDS
from sgl_blend.config import option_fields
from sgl_blend.engine.launch.checks import VERIFIED_MODELS
from sgl_blend.engine.request.options import KEYS
from sgl_blend.selection import POLICIES

README = (Path(__file__).resolve().parents[2] / "README.md").read_text()


def rows(section: str) -> dict[str, str]:
    """First column (in back quotes) to the rest of the row, of all tables in ``## section``."""
    part = README.split(f"## {section}\n", 1)[1].split("\n## ", 1)[0]
    return dict(re.findall(r"^\| `([^`]+)`[^|]*\|(.*)$", part, re.M))


def test_every_option_is_listed_with_its_default():
    listed = rows("Options")
    for f in option_fields():
        default = f.default
        if isinstance(default, tuple):
            default = ",".join(map(str, default))
        shown = listed[f.name].split("|")[0].strip()
        assert shown == ("" if default == "" else f"`{default!r}`"), f.name


def test_request_keys_policies_and_commands_are_listed():
    assert set(rows("Per request")) == set(KEYS)
    assert {name for name in POLICIES if f"`{name}`" not in README} == set()
    assert {c for c in COMMANDS if f"sgl-blend {c}`" not in README} == set()


def test_every_verified_model_is_named():
    names = {"Qwen3MoeForCausalLM": "Qwen3-MoE", "Gemma2ForCausalLM": "Gemma 2"}
    for cls in VERIFIED_MODELS:
        assert names.get(cls, cls.removesuffix("ForCausalLM")) in README, cls
