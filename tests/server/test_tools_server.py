"""``sgl-blend top`` and ``doctor`` beside real servers. Needs: CPU, real servers."""

from __future__ import annotations

import json
from collections import Counter

from polling import eventually
from talk import Docs, ask

from sgl_blend.cli.checkup import Finding
from sgl_blend.cli.main import main, make_parser
from sgl_blend.cli.probe import served
from sgl_blend.cli.top import observer


def _json(capsys, *words: str) -> tuple[int, dict]:
    code = main([*words, "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_top_counts_what_the_requests_reported(packed, capsys):
    """Tokens by source, as the answers' reports add up; the server's own store is found by what the
    server says of itself."""

    def now() -> dict:
        return _json(capsys, "top", "--url", packed.url)[1]

    before = now()
    docs = Docs(91)
    docs.warm(packed)
    answers = [ask(packed, docs.prompt(order)) for order in ([2, 0, 1], [3, 1, 2])]
    assert sum(a.blend["reused"] for a in answers) > 0
    gone = len(docs.docs) + len(answers)
    # SGLang counts a request when it has answered it.
    assert eventually(lambda: now()["requests"] >= before["requests"] + gone)
    after = now()
    for kind in ("reused", "recomputed"):
        more = after["tokens"][kind] - before["tokens"][kind]
        assert more == sum(a.blend[kind] for a in answers), kind
    assert after["blending"] is True and after["gate"]["state"] == 1 and after["ttft_s"] > 0
    assert after["store"].startswith("ipc://")
    device, memory = after["tiers"]
    assert (device["name"], device["limit"]) == ("device", 16384) and device["used"] > 0
    assert memory["name"] == "store, memory" and memory["used"] > 0
    assert main(["top", "--url", packed.url, "--once"]) == 0
    out = capsys.readouterr().out
    assert packed.url in out and "store, memory" in out and "note:" not in out


def test_explain_tells_of_every_token(packed, tmp_path, capsys):
    """A prompt of several prefill pieces: kinds add up to the report's counts, what is recomputed
    is what ranks highest in its piece, and the page holds every token."""
    packed.flush()
    docs = [f"Page {i}. " + "".join(f"{a} is {a * i + 7}; " for a in range(9)) for i in range(6)]
    params = {"temperature": 0, "max_new_tokens": 1, "custom_params": {"blend": False}}
    packed.generate(text=[f"{d}\n\n" for d in docs], sampling_params=params)
    prompt = tmp_path / "prompt.txt"
    prompt.write_text(
        "\n\n".join(docs[i] for i in (3, 0, 4, 1)) + "\n\nWhat is on page 3?" + " Please!" * 16
    )
    words = ["explain", str(prompt), "--url", packed.url, "--tokens", "4"]
    code, page = _json(capsys, *words)
    assert code == 0
    report, kinds = page["report"], Counter(t["kind"] for t in page["tokens"])
    assert report["recomputed"] > 0 and len(page["tokens"]) > 2 * 128  # the piece's size
    assert report["computed"] > 128, "one piece"
    for kind in ("prefix", "reused", "recomputed", "computed"):
        assert kinds[kind] == report[kind], (kinds, report)
    text = "".join(t["text"] for t in page["tokens"])
    assert prompt.read_text() in text
    for span in page["spans"]:
        inside = page["tokens"][span["start"] : span["end"]]
        assert all(t["span"] == span["number"] and t["score"] is not None for t in inside)
    best = min((t for t in page["tokens"] if t["rank"]), key=lambda t: t["rank"])
    assert best["kind"] == "recomputed" and best["rank"] == 1
    assert len(page["steps"]) == 4 and page["steps"][0]["kl"] is not None
    # A request that does not ask is told nothing of single tokens.
    assert "explain" not in ask(packed, prompt.read_text()).blend
    # The exact KV is there now: a prefix.
    out = tmp_path / "page.html"
    assert main([*words, "--out", str(out)]) == 0
    assert "prefix" in out.read_text() and capsys.readouterr().out.strip() == str(out)


def test_doctor(packed, model, capsys):
    """This machine, a model (the launch's own verdict), and a running server, in one go."""
    code, report = _json(
        capsys,
        *("doctor", "--url", packed.url, "--model", str(model)),
        *("--server-args", "--max-total-tokens 4096"),
    )
    assert code == report["faults"] == 0, report
    found = [(f["level"], f["subject"]) for f in report["findings"]]
    for subject in ("versions", "plugin", "symbols", "compiler", "memory", "disk", "server"):
        assert ("ok", subject) in found, report
    said = [f["text"] for f in report["findings"] if f["subject"] == "model"]
    assert any("rotations of its 4 layers" in text for text in said), said
    assert any("correctness gate passed" in text for text in said), said


def test_what_the_doctor_says_of_other_servers(plain, blend):
    """One without metrics is no fault; one that does not blend is."""
    [finding] = [f for f in _served(blend) if f.level == "warning"]
    assert "--enable-metrics" in finding.remedy
    [finding] = _served(plain)
    assert finding.level == "fault" and "does not blend" in finding.text


def _served(server) -> list[Finding]:
    args = make_parser().parse_args(["doctor", "--url", server.url])
    return list(served(observer(args).frame))
