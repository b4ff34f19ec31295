"""Models of several modalities: prompts of text alone are blended, prompts with images are not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from sglang.srt.managers.schedule_batch import Modality, MultimodalDataItem, MultimodalInputs

from model_support import checks_blend, checks_exact  # noqa: F401
from model_support.asks import Ask, Outcome
from model_support.compare import require_equal
from model_support.engine import Engine
from model_support.media import make_media_model
from model_support.media_shapes import make_shape, random_weights
from model_support.world import CHECKS, World, must_fail
from sgl_blend.engine.forward.model_passes import ModelPasses
from sgl_blend.engine.request import state

#: tokens of an image; on Qwen's three axes a row of them takes as many positions as it is wide
IMAGE, WIDE = 24, 6


def text_prompts(
    models: str, arch: str, names: list[str], options: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    """In a child: prompts of text alone, by checks of ``CHECKS``; the reference of those at ratio
    below 1 is the text model of the same weights."""
    path, plain = make_media_model(Path(models), arch)
    world = World(Engine(path, **options), plain)
    return {name: CHECKS[name](world) or {} for name in names}


def text_prompts_of_a_shape(models: str, name: str, checks: list[str]) -> dict[str, Any]:
    """In a child: the same where there is no text model of the same weights."""
    path = make_shape(Path(models), name)
    with random_weights():
        engine = Engine(path, args=["--load-format", "dummy"])
    world = World(engine, path)
    return {check: CHECKS[check](world) or {} for check in checks}


def counted_up_in_place(models: str) -> str:
    """In a child, negative control: Gemma 3 adds one to the positions it is given. Without copies
    of them a check that runs all rows first is off."""
    path, plain = make_media_model(Path(models), "gemma3-mm")
    world = World(Engine(path), plain)
    CHECKS["exact_by_ratio"](world)

    class Same(torch.Tensor):
        def clone(self, *args: Any, **kw: Any) -> torch.Tensor:
            return self

    run = ModelPasses.run

    def shared(passes: ModelPasses, *args: Any, **kw: Any) -> Any:
        passes.whole.positions = passes.whole.positions.as_subclass(Same)
        return run(passes, *args, **kw)

    with mock.patch.object(ModelPasses, "run", shared):
        must_fail("positions are counted up twice", lambda: CHECKS["exact_by_ratio"](world))
    return "found"


# -- prompts with images ----------------------------------------------------------------------


def image_prompts(models: str, arch: str, page_size: int) -> dict[str, Any]:
    """In a child: a prompt with an image falls back, beside others too, and is a prefix like any
    other; of its text only what stands before the image is a source."""
    path, _ = make_media_model(Path(models), arch)
    engine = Engine(path, page_size=page_size)
    world = World(engine, path)
    desk = world.desk
    a, b = (list(desk.docs[i]) for i in (0, 2))
    head = desk.fresh(8) + a
    tokens = head + [10**6 + 3] * IMAGE + b + desk.fresh(20)
    with _with_images(engine, len(head)):
        ask = Ask(tokens, new_tokens=3)
        [full] = engine.exact(ask)
        world.stock()
        [ours] = engine.run(ask)
        require_equal(ours, full, "a prompt with an image, over a full tree")
        _fell_back(ours, "multimodal input")
        [again] = engine.run(ask)
        assert again.prefix >= len(tokens) - engine.page_size
        require_equal(again, full, "the same again")
        plain = _no_source(world, ask, a, b, full)
        beside = _beside(world, ask, full)
        with mock.patch.object(state, "_media_start", lambda inputs: len(tokens)):
            must_fail("text behind an image is indexed", lambda: _no_source(world, ask, a, b, full))
    return {"reused before the image": plain, "beside": beside}


def _no_source(world: World, ask: Ask, a: list[int], b: list[int], full: Outcome) -> int:
    engine = world.engine
    engine.flush()
    [alone] = engine.run(ask)
    require_equal(alone, full, "over an empty tree")
    moved = world.desk.fresh(30) + b + a + world.desk.fresh(40)
    [text] = engine.run(Ask(moved, policy="none"))
    engine.check()
    begin = 30 + len(b)
    spans = text.pieces[0].blend.plan.spans
    assert all(span.start >= begin for span in spans), [(s.start, s.end) for s in spans]
    assert text.report["reused"] > len(a) // 2, text.report
    return text.report["reused"]


def _beside(world: World, ask: Ask, full: Outcome) -> int:
    """A text prompt that would be blended, in a batch with an image: neither is."""
    engine = world.engine
    tokens, _ = world.desk.prompt((1, 3), 7)
    text = Ask(tokens, policy="query", ratio=0.25, new_tokens=2)
    plain = world.full(tokens, 2)
    cases = 0
    for first in (True, False):
        world.stock()
        asks = (ask, text) if first else (text, ask)
        outcomes = dict(zip(map(id, asks), engine.run(*asks), strict=True))
        require_equal(outcomes[id(ask)], full, "beside text")
        require_equal(outcomes[id(text)], plain, "beside an image")
        _fell_back(outcomes[id(text)], "multimodal input in the batch")
        engine.check()
        cases += 1
    world.stock()
    [alone] = engine.run(text)
    assert alone.report["reused"] > 0 and alone.report["fallback"] is None
    return cases


def _fell_back(ours: Outcome, reason: str) -> None:
    r = ours.report
    assert r["fallback"] == reason and r["reused"] == r["recomputed"] == 0, r
    assert r["exact"] == len(ours.k[0]), r


@contextmanager
def _with_images(engine: Engine, at: int) -> Iterator[None]:
    """Requests whose prompt has an image at ``at`` bring it along, its embeddings computed."""
    request = engine.request
    hidden = engine.runner.model_config.hidden_size
    features = torch.randn(IMAGE, hidden, generator=torch.Generator().manual_seed(1))

    def with_image(ask: Ask) -> Any:
        req = request(ask)
        if any(t >= 10**6 for t in ask.tokens):
            item = MultimodalDataItem(
                modality=Modality.IMAGE,
                hash=3,
                pad_value=10**6 + 3,
                offsets=[(at, at + IMAGE - 1)],
                precomputed_embeddings=features.clone(),
            )
            inputs = MultimodalInputs([item])
            if engine.runner.model_config.model_is_mrope:
                inputs.mrope_positions = _axes(len(ask.tokens), at)
                last = inputs.mrope_positions.max() + 1
                inputs.mrope_position_delta = (last - len(ask.tokens)).reshape(1, 1)
            req.multimodal_inputs = inputs
        return req

    with mock.patch.object(engine, "request", with_image):
        yield


def _axes(count: int, at: int) -> torch.Tensor:
    """int64 [3, count]: time, height and width, an image of rows of ``WIDE``."""
    text = torch.arange(count).expand(3, -1).clone()
    cell = torch.arange(IMAGE)
    image = torch.stack([torch.zeros_like(cell), cell // WIDE, cell % WIDE])
    text[:, at : at + IMAGE] = at + image
    text[:, at + IMAGE :] += WIDE - IMAGE
    return text
