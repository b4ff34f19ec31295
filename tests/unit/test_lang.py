"""Prompts of parts: where chunks lie in the tokens, with and without a chat template. Runs on CPU
with a byte-level tokenizer."""

from __future__ import annotations

import pytest
from transformers import AutoTokenizer

from sgl_blend.engine.request.options import parse_options
from sgl_blend.errors import PromptError
from sgl_blend.harness.models import make_tokenizer
from sgl_blend.lang import Chunk, Prompt, chat, prompt

TEMPLATE = "<s>{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}"
ONE, TWO = Chunk("first document, \n with lines "), Chunk("second: é")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.chat_template = TEMPLATE + "{% if add_generation_prompt %}[assistant]{% endif %}"
    return tokenizer


def between(tokenizer, p: Prompt) -> list[str]:
    """The text of the prompt, cut at its boundaries."""
    cuts = [0, *p.boundaries, len(p.ids)]
    return [tokenizer.decode(p.ids[a:b]) for a, b in zip(cuts, cuts[1:], strict=False)]


def test_a_chunk_has_the_same_tokens_wherever_it_stands(tokenizer):
    p = prompt(tokenizer, ["Read. ", ONE, " and ", TWO, "What?"])
    assert between(tokenizer, p) == ["Read. ", ONE, " and ", TWO, "What?"]
    alone = prompt(tokenizer, [TWO])
    assert alone.ids == tuple(tokenizer(TWO)["input_ids"])
    a, b = p.boundaries[2:]
    assert p.ids[a:b] == alone.ids[-(b - a) :]


def test_chunks_side_by_side_share_a_boundary_and_empty_ones_have_none(tokenizer):
    p = prompt(tokenizer, [ONE, TWO, Chunk(""), "?"])
    assert between(tokenizer, p)[-3:] == [ONE, TWO, "?"]
    assert list(p.boundaries) == sorted(set(p.boundaries))
    assert prompt(tokenizer, ["no chunk"]).boundaries == ()


def test_chunks_in_every_role_of_a_chat(tokenizer):
    messages = [
        {"role": "system", "content": ONE},
        {"role": "user", "content": ["See ", TWO, ONE, " now"]},
        {"role": "tool", "content": [TWO]},
        {"role": "user", "content": "and?"},
    ]
    p = chat(tokenizer, messages)
    assert between(tokenizer, p) == [
        "<s>[system]",
        ONE,
        "</s>[user]See ",
        TWO,
        ONE,
        " now</s>[tool]",
        TWO,
        "</s>[user]and?</s>[assistant]",
    ]
    plain = [{**m, "content": "".join(m["content"])} for m in messages]
    text = tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=True)
    assert tokenizer.decode(p.ids) == text
    assert (
        chat(tokenizer, messages, add_generation_prompt=False).ids == p.ids[: -len("[assistant]")]
    )


def test_contents_of_other_kinds_are_the_templates_own(tokenizer):
    call = {"role": "assistant", "content": None, "tool_calls": []}
    p = chat(tokenizer, [call, {"role": "tool", "content": ONE}])
    assert between(tokenizer, p)[1] == ONE


def test_a_template_that_loses_or_moves_chunks_is_refused(tokenizer):
    messages = [{"role": "user", "content": ONE}, {"role": "user", "content": TWO}]
    last = "{{ messages[-1].content }}"
    for template in (last, "{{ messages[1].content }}{{ messages[0].content }}", last * 2):
        with pytest.raises(PromptError, match="each is needed once, in order"):
            chat(tokenizer, messages, chat_template=template)


def test_bodies_say_where_the_chunks_are_and_what_else_is_wished():
    p = Prompt((1, 2, 3), (1, 2))
    assert p.generate({"max_new_tokens": 4}, ratio=0.2) == {
        "input_ids": [1, 2, 3],
        "sampling_params": {
            "max_new_tokens": 4,
            "custom_params": {"blend_ratio": 0.2, "blend_boundaries": [1, 2]},
        },
    }
    said = p.openai(blend=False)
    assert said["prompt"] == [1, 2, 3]
    options = parse_options(said["extra_body"]["custom_params"], 3)
    assert options.boundaries == (1, 2) and not options.enabled
