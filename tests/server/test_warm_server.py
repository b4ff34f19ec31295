"""``sgl-blend warm`` through real servers: documents are there, exact, for whom they were meant."""

from __future__ import annotations

import json

import pytest
from talk import ask, check_report

from sgl_blend.bench.demo import shipped_model
from sgl_blend.cli.main import main
from sgl_blend.eval.tasks import make_case


@pytest.fixture(scope="module")
def server(start):
    """The shipped model, in a KV pool that is smaller than its context."""
    return start(shipped_model(), ["--enable-blend", "--max-total-tokens", "1500"])


def _warm(capsys, *words: str) -> dict:
    code = main(["warm", "--json", *words])
    out, err = capsys.readouterr()
    assert code == 0, err
    return json.loads(out)


def test_warmed_documents_are_reused_and_answer_right(server, tmp_path, capsys):
    server.flush()
    case = make_case(3)
    path = tmp_path / "docs.jsonl"
    path.write_text("".join(json.dumps({"text": d}) + "\n" for d in case.documents))
    question = case.questions[0]
    exact = ask(server, case.prompt(question), new=4, custom={"blend": False})
    server.flush()
    summary = _warm(capsys, str(path), "--url", server.url)
    assert summary["documents"] == summary["prompts"] == len(case.documents)
    assert summary["blending"] is True and not summary["failed"]
    again = _warm(capsys, str(path), "--url", server.url)
    assert again["cached"] >= again["tokens"] - 2 * again["prompts"]
    # Another tenant's prompt finds nothing of it.
    other = ask(server, case.prompt(question), new=4, cache_salt="bob")
    assert other.blend["reused"] == 0
    answer = ask(server, case.prompt(question), new=4)
    check_report(answer)
    assert answer.blend["reused"] + answer.blend["recomputed"] > 0.5 * answer.meta["prompt_tokens"]
    assert answer.tokens == exact.tokens
    _warm(capsys, str(path), "--url", server.url, "--cache-salt", "carol")
    hers = ask(server, case.prompt(question), new=4, cache_salt="carol")
    assert hers.blend["reused"] > 0 and hers.tokens == exact.tokens


def test_what_is_longer_than_the_server_takes_is_cut(server, tmp_path, capsys):
    """Longer than the KV pool holds, which the model's context would have allowed."""
    server.flush()
    paragraph = "The old mill stood near the river in June.\n\n"
    (tmp_path / "long.txt").write_text(paragraph * 260)
    summary = _warm(capsys, str(tmp_path / "long.txt"), "--url", server.url)
    assert summary["documents"] == 1 and summary["prompts"] >= 2
    assert summary["tokens"] > 2000
    assert server.alive()
