"""``sgl-blend warm`` against a fake HTTP server: what it sends, and what it does when things fail.

The fake stands in for answers that a real server gives only when it is broken or full; the way
through a real one is in tests/server/test_warm_server.py. CPU only.
"""

from __future__ import annotations

import io
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sgl_blend.cli import warming
from sgl_blend.cli.documents import read_documents, split_to_fit
from sgl_blend.cli.main import main
from sgl_blend.harness.server import free_port

LIMIT = 21


class FakeServer:
    """Counts words as tokens. ``answers``: status and body for a prompt with that word in it, one
    after another; the last one stays."""

    def __init__(self):
        self.prompts: list[dict] = []
        self.headers: list[dict] = []
        self.answers: dict[str, list[tuple[int, object]]] = {}
        self.info: object = {"max_req_input_len": LIMIT}
        self.most = self._running = 0
        self._lock = threading.Lock()
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_args):
                return None

            def do_GET(self):
                self.reply(200 if fake.info is not None else 404, fake.info or {})

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if self.path == "/tokenize":
                    n = len(body["prompt"].split())
                    self.reply(200, {"count": n, "max_model_len": LIMIT})
                else:
                    self.reply(*fake.generate(body, dict(self.headers)))

            def reply(self, status, answer):
                raw = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(raw)))
                self.end_headers()
                self.wfile.write(raw)

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    def generate(self, body, headers):
        with self._lock:
            self._running += 1
            self.most = max(self.most, self._running)
            self.prompts.append(body)
            self.headers.append(headers)
            told = next((a for word, a in self.answers.items() if word in body["text"]), None)
            answer = None
            if told:
                answer = told.pop(0) if len(told) > 1 else told[0]
        threading.Event().wait(0.02)
        with self._lock:
            self._running -= 1
        n = len(body["text"].split())
        return answer or (200, {"meta_info": {"prompt_tokens": n, "cached_tokens": 1, "blend": {}}})

    def close(self):
        self._http.shutdown()
        self._http.server_close()


@pytest.fixture
def fake():
    server = FakeServer()
    yield server
    server.close()


def _warm(capsys, *words: str) -> tuple[int, dict, str]:
    how = [] if {"--behind", "--company"} & {*words} else ["--alone"]
    code = main(["warm", "--json", *how, *(w for w in words if w != "--company")])
    out, err = capsys.readouterr()
    return code, json.loads(out) if out else {}, err


def test_each_document_stands_behind_another_ones_head(fake, tmp_path, capsys):
    """The first one's head is a prefix that all others share; one alone has nothing before it."""
    fake.info = {"max_req_input_len": 1000}
    first = "Once. " * 300
    texts = [first, "two words", "and three words"]
    path = tmp_path / "docs.jsonl"
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    code, summary, _ = _warm(capsys, str(path), "--url", fake.url, "--company")
    head = ("Once. " * 166).strip()
    assert code == 0 and summary["documents"] == summary["prompts"] == 3
    assert {b["text"] for b in fake.prompts} == {
        f"two words\n\n{first}", f"{head}\n\ntwo words", f"{head}\n\nand three words",
    }  # fmt: skip
    fake.prompts.clear()
    path.write_text(json.dumps({"text": "the only one"}))
    assert _warm(capsys, str(path), "--url", fake.url, "--company")[0] == 0
    assert [b["text"] for b in fake.prompts] == ["the only one"]


def test_documents_behind_a_text_of_ones_own(fake, tmp_path, capsys):
    fake.info = {"max_req_input_len": 9}
    (tmp_path / "head").write_text("Be brief.\n\n")
    (tmp_path / "doc.txt").write_text("one two three four five six seven eight nine ten")
    words = str(tmp_path / "doc.txt"), "--url", fake.url, "--behind", str(tmp_path / "head")
    code, summary, _ = _warm(capsys, *words)
    assert code == 0 and summary["prompts"] == 2
    assert all(b["text"].startswith("Be brief.\n\n") for b in fake.prompts)
    assert all(len(b["text"].split()) < 9 for b in fake.prompts)
    (tmp_path / "head").write_text(" ")
    assert main(["warm", *words]) == 2
    assert "--alone" in capsys.readouterr().err


def test_all_kinds_of_sources(fake, tmp_path, capsys, monkeypatch):
    (tmp_path / "docs" / "deep").mkdir(parents=True)
    (tmp_path / "docs" / "deep" / "b.md").write_text("from a folder")
    (tmp_path / "docs" / "a.jsonl").write_text('{"body": "line one"}\n\n{"body": "line two"}\n')
    (tmp_path / "docs" / ".hidden.txt").write_text("not this")
    (tmp_path / "docs" / "picture.png").write_bytes(b"\xff\xfe")
    (tmp_path / "plain").write_text("no suffix needed")
    monkeypatch.setattr("sys.stdin", io.StringIO("from standard input"))
    words = [str(tmp_path / "docs"), str(tmp_path / "plain"), "-", "--field", "body"]
    code, summary, _ = _warm(
        capsys, *words, "--url", fake.url, "--cache-salt", "alice", "--extra-key", "k"
    )
    assert code == 0
    assert sorted(b["text"] for b in fake.prompts) == [
        "from a folder", "from standard input", "line one", "line two", "no suffix needed",
    ]  # fmt: skip
    for body in fake.prompts:
        assert body["sampling_params"]["custom_params"] == {"blend": False}
        assert (body["cache_salt"], body["extra_key"]) == ("alice", "k")
    assert summary["documents"] == summary["prompts"] == 5
    assert summary["tokens"] == 13 and summary["cached"] == 5 and summary["blending"] is True


def test_separators_make_documents(fake, tmp_path, capsys):
    (tmp_path / "f.txt").write_text("one two\n---\nthree\n---\n\n---\nfour")
    code, summary, _ = _warm(capsys, str(tmp_path), "--split", r"\n---\n", "--url", fake.url)
    assert code == 0 and summary["documents"] == 3
    assert sorted(b["text"] for b in fake.prompts) == ["four", "one two", "three"]
    assert "cache_salt" not in fake.prompts[0]


def test_long_documents_are_cut_after_paragraphs(fake, tmp_path, capsys):
    paragraphs = [" ".join(f"w{i}x{j}" for j in range(7)) + "\n\n" for i in range(12)]
    (tmp_path / "f.txt").write_text("".join(paragraphs))
    code, summary, _ = _warm(capsys, str(tmp_path), "--url", fake.url)
    assert code == 0 and summary["documents"] == 1 and summary["prompts"] > 4
    assert summary["tokens"] == 12 * 7
    sent = [b["text"] for b in fake.prompts]
    assert "".join(sent) == "".join(paragraphs)
    assert all(text.endswith("\n\n") and len(text.split()) < LIMIT for text in sent)


def test_requests_at_a_time_are_bounded(fake, tmp_path, capsys):
    (tmp_path / "f.jsonl").write_text("".join(f'{{"text": "doc {i}"}}\n' for i in range(30)))
    code, *_ = _warm(capsys, str(tmp_path), "--concurrency", "3", "--url", fake.url)
    assert code == 0 and fake.most == 3 and len(fake.prompts) == 30


def test_failures_are_told_and_do_not_stop_the_rest(fake, tmp_path, capsys):
    lines = ['{"text": "good"}', '{"text": "ghastly"}', '{"text": "gone"}', '{"text": "odd"}']
    lines += ["not json", '{"other": 1}', '{"text": "stopped"}', '{"text": "fine"}']
    (tmp_path / "f.jsonl").write_text("\n".join(lines))
    (tmp_path / "raw.txt").write_bytes(b"\xff\xfe\x00")
    fake.answers = {
        "ghastly": [(500, b"broken")],
        "gone": [(400, {"error": {"message": "too bad"}})],
        "odd": [(200, {"unexpected": 1})],
        "stopped": [
            (
                200,
                {"meta_info": {"finish_reason": {"type": "abort", "message": "out of memory"}}},
            )
        ],
    }
    code, summary, _ = _warm(
        capsys, str(tmp_path / "f.jsonl"), str(tmp_path / "raw.txt"), str(tmp_path / "absent.txt"),
        "--url", fake.url,
    )  # fmt: skip
    assert code == 1
    assert summary["documents"] == 10 and summary["prompts"] == 2
    reasons = {source.rpartition("/")[2]: reason for source, reason in summary["failed"]}
    for source, part in {
        "f.jsonl:2": "500: broken",
        "f.jsonl:3": "too bad",
        "f.jsonl:4": "not SGLang's",
        "f.jsonl:5": "not JSON",
        "f.jsonl:6": "no text in the field 'text'",
        "f.jsonl:7": "aborted the request: out of memory",
        "raw.txt": "cannot be read",
        "absent.txt": "cannot be read",
    }.items():
        assert part in reasons.pop(source)
    assert not reasons
    assert main(["warm", "--alone", str(tmp_path / "f.jsonl"), "--url", fake.url]) == 1
    out, err = capsys.readouterr()
    assert out.split()[-1] == "6" and err.count("failed: ") == 6


def test_a_full_queue_is_waited_for(fake, tmp_path, capsys, monkeypatch):
    (tmp_path / "f.txt").write_text("patience")
    fake.answers = {"patience": [(503, b"queue full"), (429, b"slow down"), (200, {})]}
    fake.answers["patience"][2] = (200, {"meta_info": {"prompt_tokens": 1}})
    code, summary, err = _warm(capsys, str(tmp_path), "--url", fake.url)
    assert code == 0 and len(fake.prompts) == 3 and summary["blending"] is False
    fake.answers = {"patience": [(503, b"queue full")]}
    monkeypatch.setattr(warming, "_RETRY_S", 60.0)  # there is no time for another try
    code, summary, _ = _warm(capsys, str(tmp_path), "--url", fake.url, "--timeout", "30")
    assert code == 1 and "503" in summary["failed"][0][1]


def test_what_cannot_begin_is_one_clear_line(fake, tmp_path, capsys):
    (tmp_path / "f.txt").write_text("text")
    (tmp_path / "empty").mkdir()
    nowhere = f"http://127.0.0.1:{free_port()}"
    for words, message in (
        ([str(tmp_path), "--url", nowhere], "no answer from"),
        ([str(tmp_path), "--concurrency", "0"], "above 0"),
        ([str(tmp_path), "--split", ""], "--split is empty"),
        ([str(tmp_path / "empty"), "--url", fake.url], "no text was found"),
    ):
        assert main(["warm", *words]) == 2
        err = capsys.readouterr().err
        assert message in err and err.count("\n") == 1


def test_the_limit_and_the_key(fake, tmp_path, capsys):
    (tmp_path / "f.txt").write_text("text")
    fake.info = {"no": "limit"}
    assert _warm(capsys, str(tmp_path), "--url", fake.url, "--api-key", "s3")[0] == 0
    assert fake.headers[0]["Authorization"] == "Bearer s3"
    fake.info = None
    code, _, err = _warm(capsys, str(tmp_path), "--url", fake.url)
    assert code == 2 and "404" in err


@given(st.text(alphabet="ab \n.", max_size=300), st.integers(1, 40))
def test_parts_fit_and_make_up_the_text(text, limit):
    parts = split_to_fit(text, limit, len)
    assert "".join(parts) == text
    assert all(0 < len(part) <= limit for part in parts) or parts == [text]


def test_a_token_that_is_longer_than_the_limit_ends():
    assert split_to_fit("abcdef", 1, lambda t: 5) == list("abcdef")


def test_reading_is_lazy(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\nbroken\n')
    docs = read_documents([str(tmp_path / "a.jsonl"), str(tmp_path / "absent")])
    assert next(docs).text == "one"
    assert [bool(d.problem) for d in docs] == [True, True]
