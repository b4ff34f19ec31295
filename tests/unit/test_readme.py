"""README and docs against the code: what they list is what there is. Runs on CPU."""

import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

from sgl_blend.cli.main import COMMANDS
from sgl_blend.engine.forward.company import PREVENTS
from sgl_blend.engine.launch.checks import TESTED_MEDIA, TESTED_MODELS
from sgl_blend.engine.request.options import KEYS
from sgl_blend.engine.request.report import report_of
from sgl_blend.gate.state import TURNED_OFF
from sgl_blend.selection import POLICIES

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
REFERENCE = (ROOT / "docs" / "reference.md").read_text()
COMPATIBILITY = (ROOT / "docs" / "compatibility.md").read_text()
FIDELITY = (ROOT / "docs" / "fidelity.md").read_text()
REQUESTS = (ROOT / "docs" / "requests.md").read_text()


def rows(section: str) -> dict[str, str]:
    """First column (in back quotes) to the rest of the row, of all tables in the reference's
    ``## section``."""
    part = REFERENCE.split(f"## {section}\n", 1)[1].split("\n## ", 1)[0]
    return dict(re.findall(r"^\| `([^`]+)`[^|]*\|(.*)$", part, re.M))


def test_the_generated_tables_of_the_reference_are_current():
    run = subprocess.run(
        [sys.executable, str(ROOT / ".ci" / "reference.py"), "--check"],
        capture_output=True,
        text=True,
    )
    assert (run.returncode, run.stderr) == (0, "")


def test_request_keys_policies_and_commands_are_listed():
    assert set(rows("Per request")) == set(KEYS)
    assert {name for name in POLICIES if f"`{name}`" not in FIDELITY} == set()
    assert {c for c in COMMANDS if f"sgl-blend {c}`" not in REFERENCE} == set()


def test_reports_are_shown_as_they_are():
    """The example of a report has its fields, and no others, wherever one is shown."""
    source = inspect.getsource(report_of)
    fields = re.findall(r'^ {8}"(\w+)": ', source, re.M)
    for text in (REFERENCE, REQUESTS):
        (shown,) = re.findall(r'^```json\n(\{"prefix": .*?\})\n```', text, re.M | re.S)
        assert [*json.loads(shown)] == fields


def test_every_metric_is_listed():
    source = (ROOT / "sgl_blend" / "engine" / "metrics.py").read_text()
    exported = set(re.findall(r'"sgl_blend:(\w+)"', source))
    listed = {name.partition("{")[0] for name in rows("Metrics")}
    assert exported and listed == {f"sgl_blend:{name}" for name in exported}


def test_every_tested_model_is_named():
    path = "examples/benchmarks/results/architectures.md"
    table = (ROOT / path).read_text()
    assert path in COMPATIBILITY
    names = {"Gemma2ForCausalLM": "Gemma 2", "GptOssForCausalLM": "gpt-oss"}
    for cls in TESTED_MODELS:
        name = names.get(cls, cls.removesuffix("ForCausalLM"))
        assert f"| {cls} |" in table or (name in README and name in COMPATIBILITY), cls
    assert {cls for cls in TESTED_MEDIA if f"`{cls}`" not in COMPATIBILITY} == set()


def test_every_reason_to_fall_back_is_listed():
    source = "".join(
        (ROOT / "sgl_blend" / "engine" / name).read_text()
        for name in (
            "request/state.py",
            "request/lookup.py",
            "request/planner.py",
            "forward/company.py",
        )
    )
    reasons = set(re.findall(r'(?:return|reason =|fallback =) "([^"]+)"', source))
    assert len(reasons) > 8
    reasons |= {TURNED_OFF, *PREVENTS.values()}
    assert {r for r in reasons if f"`{r}`" not in COMPATIBILITY} == set()


def test_the_readme_is_short_and_says_first_where_it_has_run():
    lines = README.splitlines()
    assert len(lines) <= 150
    assert "GPU" in "\n".join(lines[:10])
