"""The correctness gate's logic: state, ladder, window, prompts, distances, what a launch makes of
them. Needs: CPU. The model is a stand-in whose error is a function of the ratio; real models are
in ``tests/models/test_gate_models.py``, real servers in ``tests/server/test_gate_server.py``."""

from __future__ import annotations

import json
import logging
import math
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from sgl_blend.config import BlendConfig, load_config
from sgl_blend.engine.gate.launch import LaunchGate, ratio_matters
from sgl_blend.engine.metrics import Metrics
from sgl_blend.errors import ConfigError, GateError
from sgl_blend.gate.fidelity import (
    Calibrator,
    Distance,
    Mean,
    climb,
    distance,
    noticeable,
    within,
)
from sgl_blend.gate.mechanics import MAX_DOCUMENT, make_prompt, slots_needed
from sgl_blend.gate.model import Sizes
from sgl_blend.gate.prompts import (
    BUILT_IN_TOKENS,
    Calibration,
    TextPrompt,
    built_in,
    encode,
    read_prompts,
)
from sgl_blend.gate.state import GateState, ladder
from sgl_blend.gate.window import LEAST, LiveWindow

SHIPPED = Path(__file__).resolve().parents[2] / "examples" / "models" / "blend-4l"


# -- ladder, budget, window --------------------------------------------------------------


def test_ladder_rises_by_half_to_the_ceiling():
    assert ladder(0.1, 0.5) == [0.15, 0.225, 0.3375, 0.5]
    assert ladder(0.5, 0.5) == ladder(0.6, 0.5) == []
    assert ladder(0.0, 0.02) == [0.015, 0.02]


def test_budget_counts_top1_only_where_there_are_prompts_enough():
    c = BlendConfig(gate_max_kl=0.1, gate_min_top1=0.9)
    assert within(Mean(0.1, 0.0, 9), c)
    assert not within(Mean(0.1, 0.89, 10), c)
    assert within(Mean(0.1, 0.9, 10), c)
    assert not within(Mean(0.11, 1.0, 10), c)
    assert not within(Mean(math.inf, 1.0, 1), c) and not within(Mean(math.nan, 1.0, 1), c)


def test_answers_that_differ_are_noticed_within_the_budget():
    """The figures that SmolLM2 had at the first default: KL 0.14, top-1 agreement 60 to 80 %."""
    c = BlendConfig(gate_min_top1=0.5)
    assert within(Mean(0.14, 0.7, 12), c) and noticeable(Mean(0.14, 0.7, 12), c)
    assert noticeable(Mean(0.14, 1.0, 2), c) and not noticeable(Mean(0.05, 0.0, 2), c)
    assert noticeable(Mean(0.0, 0.94, 10), c) and not noticeable(Mean(0.05, 0.95, 20), c)
    assert not noticeable(Mean(0.14, 1.0, 20), BlendConfig(gate_warn_kl=0.2))


def test_window_warns_once_of_answers_that_differ():
    gate = GateState(0.1)
    w = LiveWindow(gate, BlendConfig(), True)
    said = []
    for _ in range(3 * LEAST):
        assert w.add(Distance(0.2, 1.0), 0.1) is None
        said.append(w.warning())
    assert said.count(None) == len(said) - 1 and "KL 0.2 nats" in said[LEAST - 1]
    assert gate.on and gate.ratio == 0.1
    sound = LiveWindow(gate, BlendConfig(), True)
    assert all(sound.add(Distance(0.03, 1.0), 0.1) or sound.warning() is None for _ in range(99))


def test_climb_stops_at_the_first_ratio_within_the_budget():
    asked = []

    def measure(ratio):
        asked.append(ratio)
        return Mean(1.0 - 2 * ratio, 1.0, 4)

    c = BlendConfig()
    rungs = climb(measure, 0.1, c, True)
    assert asked == [0.1, 0.15, 0.225, 0.3375] and [r.within for r in rungs] == [False] * 3 + [True]
    assert len(climb(measure, 0.1, c, False)) == 1
    assert not climb(lambda r: Mean(9.0, 1.0, 4), 0.1, c, True)[-1].within


def test_ratio_matters_where_the_policy_listens_to_it():
    assert ratio_matters(BlendConfig()) and ratio_matters(BlendConfig(policy="leading"))
    assert not ratio_matters(BlendConfig(policy="none"))
    assert not ratio_matters(BlendConfig(policy="all"))
    assert not ratio_matters(BlendConfig(policy="leading", leading_tokens=8))


def test_window_raises_the_ratio_then_turns_off():
    gate = GateState(0.1)
    w = LiveWindow(gate, BlendConfig(gate_max_ratio=0.2), True)
    bad = Distance(2.0, 0.0)
    for _ in range(LEAST - 1):
        assert w.add(bad, 0.1) is None
    assert "the default ratio is now 0.15" in w.add(bad, 0.1)
    assert gate.on and gate.ratio == 0.15 and w.mean() is None
    # What was still under way at the old ratio says nothing about the new one.
    assert all(w.add(bad, 0.1) is None for _ in range(3 * LEAST))
    said = [w.add(bad, 0.15) for _ in range(LEAST)]
    assert said[:-1] == [None] * (LEAST - 1) and gate.ratio == 0.2
    said = [w.add(bad, 0.2) for _ in range(LEAST)]
    assert "Blending is OFF" in said[-1] and not gate.on and "KL 2 nats" in gate.why_off
    assert w.add(bad, 0.2) is None


def test_window_forgets_old_samples_and_bears_a_few_bad_ones():
    gate = GateState(0.1)
    w = LiveWindow(gate, BlendConfig(), True)
    for i in range(400):
        bad = i % 10 == 0
        assert w.add(Distance(3.0 if bad else 0.05, float(not bad)), 0.1) is None
    assert gate.on and gate.ratio == 0.1
    while gate.ratio == 0.1:
        w.add(Distance(3.0, 0.0), 0.1)
    assert gate.ratio == 0.15


def test_a_gate_that_is_off_stays_off():
    gate = GateState(0.1)
    gate.turn_off("first")
    gate.turn_off("second")
    assert not gate.on and gate.why_off == "first"


# -- distances ---------------------------------------------------------------------------


def test_top_tokens_agree_up_to_near_ties():
    exact = torch.tensor([3.0, 2.5, 2.2, -1.0])
    for top, agrees in ((0, 1.0), (1, 1.0), (2, 0.0), (3, 0.0)):
        blended = exact.clone()
        blended[top] += 5.0
        assert distance(exact, blended).top1 == agrees


def test_distance_is_the_divergence_by_definition():
    a, b = torch.randn(50), torch.randn(50)
    p, q = a.softmax(0).double(), b.softmax(0).double()
    got = distance(a, b)
    assert got.kl == pytest.approx(float((p * (p / q).log()).sum()), rel=1e-4)
    assert distance(a, a) == Distance(0.0, 1.0)
    masked = a.clone()
    masked[7] = float("-inf")
    assert distance(masked, masked).kl == 0.0
    assert distance(a, torch.full((50,), float("nan"))).kl == math.inf


# -- prompts -----------------------------------------------------------------------------


def test_prompt_file_round_trip_and_errors(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"documents": ["a b", "c"], "question": "d?"}\n\n')
    assert read_prompts(str(path)) == (TextPrompt(("a b", "c"), "d?"),)
    for text, said in (
        ("", "holds no prompt"),
        ("nonsense\n", "line 1"),
        ('{"documents": ["a"]}', "line 1: expected"),
        ('{"documents": ["a"], "question": "b"}\n{"documents": [], "question": "b"}', "line 2"),
        ('{"documents": ["a", 3], "question": "b"}', "must be texts"),
        ('{"documents": "a", "question": "b"}', "must be a list"),
        ('{"documents": ["a"], "question": ""}', "not empty"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError) as e:
            read_prompts(str(path))
        assert str(path) in str(e.value) and said in str(e.value)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_prompts(str(tmp_path / "missing"))


class Words:
    """A tokenizer of words: each gets the next free id; 1 begins a text."""

    def __init__(self) -> None:
        self.ids: dict[str, int] = {}

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        body = [self.ids.setdefault(w, 10 + len(self.ids)) for w in text.split()]
        return [1, *body] if add_special_tokens else body


def test_documents_are_tokenised_alone_and_begin_as_a_prompt_does():
    c = encode(TextPrompt(("x y", "z"), "q r"), Words())
    x, y, z, q, r = c.tokens[1:]
    assert c.tokens[0] == 1 and c.sources == ((1, x, y), (1, z))
    assert len({x, y, z, q, r}) == 5


def test_built_in_prompts_are_short_and_skip_a_tokenizer_that_does_not_know_them():
    prompts = built_in(Words())
    assert len(prompts) == 12 and len({frozenset(p.sources) for p in prompts}) == 1
    assert len({p.sources for p in prompts}) == 4  # in as many orders
    assert all(len(s) <= BUILT_IN_TOKENS + 1 for p in prompts for s in p.sources)
    # With the sources once, and two prompts once: what a launch pays for at the least.
    assert sum(len(p.tokens) for p in prompts[:2]) + 6 * (BUILT_IN_TOKENS + 1) < 1200
    from transformers import AutoTokenizer

    assert built_in(AutoTokenizer.from_pretrained(SHIPPED)) == []  # knows other words


@pytest.mark.parametrize(
    "options",
    [{}, {"min_span_tokens": 100}, {"chunk_max_tokens": 300}, {"min_span_tokens": 5000}],
)
@pytest.mark.parametrize("page", [1, 16, 64])
def test_probes_are_bounded_and_within_the_given_ids(options, page):
    p = make_prompt(BlendConfig(**options), page, (500, 900), 3)
    assert p == make_prompt(BlendConfig(**options), page, (500, 900), 3)
    all_ids = [t for x in (*p.sources, p.tokens, p.beside) for t in x]
    assert 500 <= min(all_ids) and max(all_ids) < 900
    assert p.documents <= 3 * MAX_DOCUMENT
    if not options and page <= 16:
        assert slots_needed(p, page) < 1500 and p.documents == 192


# -- a launch ----------------------------------------------------------------------------


@dataclass
class Ran:
    logits: torch.Tensor


class StandIn:
    """A model of 20 tokens whose blended logits are ``error(ratio)`` away from the exact ones."""

    num_layers = 1
    roundoff = 1e-7
    quantum = 0.0
    full_policy = "all"

    def __init__(self, error) -> None:
        self.error = error
        self.runs: list = []
        self.kept = 0

    def sizes(self):
        return Sizes(10_000, 8, 10_000, 1, (10, 500), 2)

    def run(self, *asks):
        self.runs += asks
        self.kept += sum(a.keep for a in asks)
        out = []
        for a in asks:
            assert all(p <= 2 for p in a.pieces) and len(a.tokens) - sum(a.pieces) in (1, 2)
            logits = torch.zeros(20)
            logits[3] = 5.0
            if a.policy is not None:
                assert self.kept, "blended before its documents were prefilled"
                logits[3] -= self.error(a.ratio)
            out.append(Ran(logits))
        return out

    def release(self, *ran):
        pass

    def flush(self):
        self.kept = 0

    def agree(self, values):
        return list(values)


def launch(error, prompts: int | None, tmp_path, mechanics=("fine",), **options):
    """(gate, metrics, stand-in) of a launch; ``prompts``: in the operator's file."""
    if prompts is not None:
        path = tmp_path / "p.jsonl"
        line = {"documents": ["a b c d", "e f g"], "question": "h"}
        path.write_text("".join(json.dumps(line) + "\n" for _ in range(prompts)))
        options["gate_prompts"] = str(path)
    config = BlendConfig(**options)
    gate, metrics, model = GateState(config.recompute_ratio), Metrics(), StandIn(error)
    one = LaunchGate(model, config, gate, metrics, Words(), True)
    from sgl_blend.gate.mechanics import Finding

    found = [Finding(n, 0.0 if n == "fine" else 2.0, 1.0, "it") for n in mechanics]
    one._mechanics = lambda: found
    one.run()
    return gate, metrics, model


@pytest.mark.parametrize("prompts", [None, 3])
def test_a_launch_within_the_budget_changes_nothing(tmp_path, prompts):
    gate, metrics, model = launch(lambda r: 0.1, prompts, tmp_path)
    assert gate.on and gate.ratio == 0.1 and not metrics.gate_failures
    assert {a.ratio for a in model.runs if a.policy} == {0.1}
    assert {a.policy for a in model.runs} == {None, "query"}


@pytest.mark.parametrize("prompts", [None, 3])
def test_a_launch_within_the_budget_warns_of_answers_that_differ(tmp_path, prompts, caplog):
    with caplog.at_level(logging.INFO):
        gate, metrics, _ = launch(lambda r: 1.5, prompts, tmp_path)
    assert gate.on and gate.ratio == 0.1 and not metrics.gate_failures
    [warned] = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert "within the budget, and blended answers will differ" in warned and "max_risk" in warned


@pytest.mark.parametrize("prompts", [None, 3])
def test_a_launch_raises_the_ratio_as_far_as_it_must(tmp_path, prompts, caplog):
    with caplog.at_level(logging.WARNING):
        gate, metrics, _ = launch(lambda r: 9.0 if r < 0.3 else 0.0, prompts, tmp_path)
    assert gate.on and gate.ratio == 0.3375 and not metrics.gate_failures
    assert "The default ratio is now 0.3375" in caplog.text


def test_built_in_prompts_never_turn_blending_off(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        gate, _, _ = launch(lambda r: 9.0, None, tmp_path)
    assert gate.on and gate.ratio == 0.5 and "prompts of your own" in caplog.text


def test_the_operators_prompts_do(tmp_path, caplog):
    with caplog.at_level(logging.ERROR):
        gate, metrics, _ = launch(lambda r: 9.0, 3, tmp_path)
    assert not gate.on and metrics.gate_failures == {"fidelity": 1}
    assert gate.why_off.startswith("fidelity: gate_prompts: KL ")
    assert "Blending is OFF" in caplog.text
    with pytest.raises(GateError, match="fidelity: gate_prompts: KL .* gate_max_kl 0.5"):
        launch(lambda r: 9.0, 3, tmp_path, gate="fail")


def test_failed_mechanics_go_before_fidelity(tmp_path):
    gate, metrics, model = launch(lambda r: 0.0, 3, tmp_path, mechanics=("fine", "mask", "keys"))
    assert not gate.on and metrics.gate_failures == {"mask": 1, "keys": 1} and not model.runs


def test_a_probe_that_raises_is_a_failed_check(tmp_path, caplog):
    def error(ratio):
        raise RuntimeError("no kernel image")

    gate, metrics, _ = launch(error, 3, tmp_path)
    assert not gate.on and metrics.gate_failures == {"run": 1}
    assert gate.why_off == "run: a probe ended with RuntimeError: no kernel image"
    with pytest.raises(GateError, match="no kernel image"):
        launch(error, 3, tmp_path, gate="fail")


def test_off_checks_nothing(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        gate, _, model = launch(lambda r: 9.0, 3, tmp_path, mechanics=("mask",), gate="off")
    assert gate.on and not model.runs and "nothing was checked" in caplog.text


def test_prompts_without_room_are_left_out():
    model = StandIn(lambda r: 0.0)
    long = Calibration((tuple(range(9000)),), tuple(range(9001)))
    short = Calibration(((1, 2),), (1, 2, 3))
    assert Calibrator(model, [long, short]).prompts == [short]


# -- options -----------------------------------------------------------------------------


def test_a_bare_off_in_yaml_is_off(tmp_path):
    path = tmp_path / "b.yaml"
    path.write_text("gate: off\n")
    assert load_config(path=str(path), environ={}).gate == "off"
    path.write_text("gate: true\n")
    with pytest.raises(ConfigError, match="gate"):
        load_config(path=str(path), environ={})


@pytest.mark.parametrize(
    "options",
    [
        {"gate": "on"},
        {"gate_max_kl": 0.0},
        {"gate_min_top1": 1.1},
        {"gate_max_ratio": -0.1},
        {"gate_sample": 2.0},
    ],
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        BlendConfig(**options)
