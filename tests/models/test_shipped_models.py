"""The models under ``examples/models``, loaded through transformers' Llama. Needs a CPU.

Small held-out samples in fixed order; the full figures come from ``examples/train_models.py
report``. Nothing here needs a server.
"""

import json
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

from training import reuse, vocab  # noqa: E402
from training.report import SIZES  # noqa: E402

from sgl_blend.eval import tasks  # noqa: E402

NAMES = {"shallow": "blend-4l", "deep": "blend-8l"}
LAYERS = {"shallow": 4, "deep": 8}
COUNT = {"shallow": 8, "deep": 5}


@pytest.fixture(scope="module", params=NAMES)
def which(request):
    torch.set_num_threads(1)
    return request.param


@pytest.fixture(scope="module")
def subject(which):
    return reuse.Subject(EXAMPLES / "models" / NAMES[which])


@pytest.fixture(scope="module")
def cases(which):
    return [tasks.make_case(seed, **SIZES[which]) for seed in range(COUNT[which])]


def test_is_a_small_llama_of_the_promised_depth(which, subject):
    config = subject.model.config
    assert config.architectures == ["LlamaForCausalLM"]
    assert config.num_hidden_layers == LAYERS[which]
    assert len(subject.tokenizer) == config.vocab_size == len(vocab.word_ids())


def test_all_models_together_stay_under_20_mb():
    files = [f for f in (EXAMPLES / "models").rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) < 20e6


def test_tokenizer_splits_as_the_tasks_do(subject):
    case = tasks.make_case(11)
    prompt = case.prompt(case.questions[1], answered=case.questions[:1])
    ids = subject.tokenizer(prompt)["input_ids"]
    table = vocab.word_ids()
    assert ids == [vocab.BOS_ID] + [table[w] for w in tasks.split_words(prompt)]
    alone = [subject.encode(d) for d in case.documents]
    start = 1 + len(subject.encode(case.system))
    assert ids[start : start + sum(map(len, alone))] == sum(alone, [])
    assert subject.encode("xylophone") == [vocab.UNK_ID]


def test_chat_template_writes_what_conversations_write(subject):
    talk = tasks.make_conversation(5)
    for turn in range(3):
        text = subject.tokenizer.apply_chat_template(
            talk.messages(turn), tokenize=False, add_generation_prompt=True
        )
        assert text == vocab.BOS + talk.prompt(turn)


def test_full_prefill_answers(subject, cases):
    score = reuse.exact_scores(subject, cases)
    assert score.asked == 4 * len(cases)
    assert score.local == score.dependent == 1.0


def test_order_and_system_prompt_do_not_matter(subject, which):
    cases = [tasks.make_case(100 + s, **SIZES[which], system="") for s in range(COUNT[which])]
    score = reuse.exact_scores(subject, [tasks.reordered(c, c.seed) for c in cases])
    assert score.local == score.dependent == 1.0


def test_questions_after_others_are_answered(subject, cases):
    score = reuse.follow_up_scores(subject, cases)
    assert score.local == score.dependent == 1.0


def test_joint_questions_and_conversations_are_answered(subject, which):
    cases = [tasks.make_case(200 + s, **SIZES[which]) for s in range(3)]
    assert reuse.joint_score(subject, cases) == 1.0
    talks = [tasks.make_conversation(s, **SIZES[which]) for s in range(2)]
    assert reuse.talk_score(subject, talks) == 1.0
    two = cases[0].questions[:2]
    assert subject.answer(cases[0].prompt(*two)) == tasks.expected(two)
    prompt = subject.tokenizer.apply_chat_template(
        talks[1].messages(2), tokenize=False, add_generation_prompt=True
    )
    said = subject.answer(prompt.removeprefix(subject.tokenizer.bos_token))
    assert said == talks[1].turns[2].answer


@pytest.mark.parametrize("place", ["alone", "other"])
def test_full_reuse_loses_what_needs_another_document(subject, cases, place):
    scores = reuse.reuse_scores(subject, cases, place, (0.0, 0.15))
    everything = reuse.reuse_scores(subject, cases[:1], place, (1.0,))[1.0]
    assert everything.dependent == everything.local == 1.0
    assert scores[0.0].dependent <= 0.8
    assert scores[0.15].dependent <= 0.9
    assert scores[0.0].local >= 0.9


@pytest.mark.parametrize("place", ["alone", "other"])
def test_the_tokens_that_the_question_looks_at_bring_it_back(subject, cases, place):
    by_query = reuse.reuse_scores(subject, cases, place, (0.1,), "query")[0.1]
    assert by_query.dependent >= 0.9 and by_query.local >= 0.9


def test_without_a_layer_and_back(subject, cases):
    ids = subject.layout(cases[0], tasks.ask(cases[0].questions[:1])).ids
    before, _ = subject.prefill(ids)
    for layer in range(subject.layers):
        with subject.without(layer):
            changed, _ = subject.prefill(ids)
        assert not torch.allclose(changed, before, atol=1e-2)
    after, _ = subject.prefill(ids)
    assert torch.equal(after, before)


def test_all_rows_recomputed_are_the_prefill(subject, cases):
    layout = subject.layout(cases[0], tasks.ask(cases[0].questions[:1]))
    cached = subject.elsewhere(cases[0], layout, "alone")
    logits, kv = subject.prefill(layout.ids)
    again = subject.recompute(layout.ids, cached, torch.arange(len(layout.ids)))
    torch.testing.assert_close(again, logits, rtol=1e-3, atol=1e-3)
    # The head and the first document stand where they stood: their cached KV is the prefill's.
    first = layout.documents[0].end
    torch.testing.assert_close(cached.k[:, :, :first], kv.k[:, :, :first], rtol=1e-3, atol=1e-3)


def test_the_shipped_report_is_of_this_model(subject, which):
    told = json.loads((EXAMPLES / "models" / NAMES[which] / "report.json").read_text())
    for prompts in ("exact", "shuffled", "follow_up"):
        assert min(told[prompts]["dependent"], told[prompts]["local"]) >= 0.995, prompts
    assert min(told["joint"], told["talk"]) >= 0.99
    for place in ("alone", "other"):
        lost = {
            r: told["exact"]["dependent"] - s["dependent"] for r, s in told["reuse"][place].items()
        }
        assert lost["0.0"] >= 0.2 and lost["0.15"] >= 0.1
        by_query = told["reuse_query"][place]["0.1"]["dependent"]
        assert told["exact"]["dependent"] - by_query <= 0.05
    assert len(told["without_layer"]) == LAYERS[which]
