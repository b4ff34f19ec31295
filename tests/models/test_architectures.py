"""The blend prefill of many more architectures, in process. Needs: CPU only.

``test_blend_models.py`` looks at a few architectures from all sides; here each one goes once
through everything that is the model's own: its rotations are measured, the gate runs, whatever is
recomputed is SGLang's full prefill, and copies are those of transformers' implementation.
``examples/benchmarks/architectures.py`` writes what these checks measure into a table.
"""

from __future__ import annotations

import pytest
from model_support.architectures import REFUSED, WIDE, checks_of, options_of


def _cases() -> list:
    table = [(arch, options_of(arch), checks_of(arch)) for arch in WIDE if arch not in REFUSED]
    table += [
        (arch, options_of(arch), ("as_reference_briefly_bites",)) for arch in ("cohere2", "gemma3")
    ]
    return [
        pytest.param(name, arch, options, id=f"{arch}-{name}")
        for arch, options, names in table
        for name in names
    ]


@pytest.mark.parametrize(("name", "arch", "options"), _cases())
def test_architecture(checked, name: str, arch: str, options: dict) -> None:
    """``name`` is a check of ``model_support``; its docstring says what holds."""
    figures = checked(name, arch, options)
    print({k: f"{v:.2e}" if isinstance(v, float) else v for k, v in figures.items()})


@pytest.mark.parametrize("arch", REFUSED)
def test_refused(jobs, models, arch: str) -> None:
    """What cannot be moved is refused at launch, in words that name the cause."""
    message = jobs.run("model_support.checks_special:refusal", str(models), arch, False)
    for words in REFUSED[arch]:
        assert words in message, message
