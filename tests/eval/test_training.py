"""Parts of the training under ``examples/training``: loading what ships, growing it, its data.

Needs a CPU; nothing here trains for longer than a step, and nothing needs a server.
"""

import random
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

from training import curriculum, data, model, reuse  # noqa: E402

from sgl_blend.eval import tasks  # noqa: E402

SHALLOW = EXAMPLES / "models" / "blend-4l"


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    return model.load(SHALLOW)


def test_what_ships_is_loaded_as_transformers_loads_it(small):
    case = tasks.make_case(3)
    ids = torch.tensor([data.encode(case.prompt(case.questions[0]))])
    with torch.no_grad():
        logits = small(ids, torch.arange(ids.shape[1]))
    told, _ = reuse.Subject(SHALLOW).prefill(ids[0])
    torch.testing.assert_close(logits, told, rtol=1e-3, atol=1e-3)


def test_export_and_load_are_inverse(small, tmp_path):
    model.export(small, tmp_path)
    again = model.load(tmp_path)
    assert again.shape == small.shape
    for name, tensor in small.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_doubled_layers_hold_the_halves_of_the_small_ones(small):
    big = model.doubled(small)
    assert big.shape.layers == 2 * small.shape.layers
    x = torch.randn(1, 40, small.shape.hidden)
    cos, sin = small.cos[:40], small.sin[:40]
    for i, whole in enumerate(small.model.layers):
        first, second = big.model.layers[2 * i : 2 * i + 2]
        for branch, read in (
            ("self_attn", lambda part: part(x, cos, sin)),
            ("mlp", lambda part: part(x)),
        ):
            with torch.no_grad():
                halves = [read(getattr(layer, branch)) for layer in (first, second)]
                told = read(getattr(whole, branch))
            torch.testing.assert_close(sum(halves), told, rtol=1e-4, atol=1e-4)
            assert all(half.abs().max() > 0 for half in halves)


def test_deep_prompts_fit_the_positions_and_stay_off_the_held_out_seeds(monkeypatch):
    rng = random.Random(0)
    seeds = []
    for name in ("make_case", "make_conversation"):
        make = getattr(tasks, name)
        monkeypatch.setattr(
            tasks, name, lambda seed, make=make, **sizes: seeds.append(seed) or make(seed, **sizes)
        )
    for stage in curriculum.DEEP:
        for _ in range(3):
            batch = data.prompts(rng, stage.size)
            assert batch.ids.shape[1] <= model.Shape(vocab=1).max_position
    assert seeds and min(seeds) >= tasks.TRAINING_SEEDS


def test_a_trainer_goes_on_from_its_checkpoint(small, tmp_path):
    size = data.Size((1, 1), (1, 1), (3, 3), (2, 2), (2, 2), 2, (20, 20), 256)
    stages = (curriculum.Stage("one", size, 2, decay=True),)
    quiet = {"say": lambda line: None}
    begun = curriculum.Trainer(model.doubled(small), stages, 0, tmp_path / "x.pt", **quiet)
    begun.run()
    again = curriculum.Trainer(model.doubled(small), stages, 0, tmp_path / "x.pt", **quiet)
    assert (again.stage, again.total) == (1, 2)
    for name, tensor in begun.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], tensor), name
