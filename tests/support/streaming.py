"""Many clients that stream from one server at once, some of which vanish, and what is left.

    python tests/support/streaming.py --seconds 600 --clients 64
    python tests/support/streaming.py --seconds 180 --clients 8 --dashboard docs/dashboard.png

Every route of SGLang that streams takes part. A stream that is read to its end must carry a report
whose counts add up to the prompt; at the end the server must be idle and clean, and its counters
must add up to the prompts that SGLang counted. Needs: CPU, about 3 GB of memory.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import probe
import requests
from monitoring import picture
from polling import eventually
from prometheus_process import Prometheus
from routes import DONE, ROUTES, Route, details_of, report_of, served_name
from scraping import KINDS, Gained
from talk import words

from sgl_blend.harness import server as launcher
from sgl_blend.harness.models import make_model
from sgl_blend.harness.server import Server

STREAMS = [route for route in ROUTES if route.streams]
#: how the routes say how many tokens to write
LENGTHS = ("max_tokens", "max_output_tokens")
VANISH = 0.2
SEPARATOR = "<|sep|>"


@dataclass
class Streams:
    """What happened. ``problems`` must stay empty; ``reported``: tokens by origin, of streams that
    were read to their end."""

    ended: Counter = field(default_factory=Counter)
    vanished: Counter = field(default_factory=Counter)
    reported: Counter = field(default_factory=Counter)
    prompt_tokens: int = 0
    problems: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)


def lengthened(body: dict, tokens: int) -> dict:
    """The same request for so many tokens, as a stream."""
    body = {**body, "stream": True}
    for key in LENGTHS:
        if key in body:
            body[key] = tokens
    if "sampling_params" in body:
        body["sampling_params"] = {**body["sampling_params"], "max_new_tokens": tokens}
    if "options" in body:
        body["options"] = {"num_predict": tokens}
    return body


class Client:
    """One of them. Reads some streams to their end, and leaves others at any moment: before the
    first token, or after some."""

    def __init__(self, server: Server, model: str, number: int, seed: int, out: Streams) -> None:
        self.server, self.model, self.out = server, model, out
        self.rng = random.Random(f"{seed}/{number}")
        self.documents = [words(1000 * seed + i, 30 + i % 30) for i in range(24)]

    def run(self, until: float) -> None:
        while time.monotonic() < until:
            route = self.rng.choice(STREAMS)
            try:
                self.one(route)
            except Exception as e:  # any failure is a finding, reported at the end
                with self.out.lock:
                    self.out.problems.append(f"{route.path}: {type(e).__name__}: {e}"[:500])
                if not self.server.alive():
                    return

    def text(self) -> str:
        some = self.rng.sample(self.documents, self.rng.randint(2, 4))
        question = words(self.rng.randrange(1 << 30), 8)
        return SEPARATOR.join([words(self.rng.randrange(1 << 30), 3), *some, question])

    def one(self, route: Route) -> None:
        body = lengthened(route.body(self.text()), self.rng.randint(2, 40))
        if route.path == "/v1/responses":
            body["model"] = self.model
        if route.path in ("/v1/completions", "/v1/chat/completions"):
            body["stream_options"] = {"include_usage": True}
        leaves = self.rng.random() < VANISH
        reads = self.rng.randint(0, 12)
        with requests.post(
            self.server.url + route.path, json=body, stream=True, timeout=300
        ) as answer:
            if answer.status_code != 200:
                raise ValueError(f"{answer.status_code}: {answer.text[:300]}")
            lines = []
            for n, line in enumerate(answer.iter_lines()):
                if leaves and n >= reads:
                    break
                lines.append(line)
            else:
                self.check(route, lines)
                return
        with self.out.lock:
            self.out.vanished[route.path] += 1

    def check(self, route: Route, lines: list[bytes]) -> None:
        plain = [line.removeprefix(b"data: ") for line in lines if line]
        said = [json.loads(line) for line in plain if line.startswith(b"{")]
        if any("error" in event for event in said if event.get("error")):
            raise ValueError(f"an error in the stream: {said[-1]}")
        if not route.path.startswith("/api") and route.path != "/v1/messages":
            if route.path != "/v1/responses" and DONE not in plain:
                raise ValueError(f"the stream ended early: {plain[-1:]}")
        report = next((r for r in map(report_or_none, reversed(said)) if r is not None), None)
        if report is None:
            raise ValueError(f"no report in {len(said)} events; the last: {plain[-1:]}")
        total = sum(report[kind] for kind in KINDS)
        stated = prompt_tokens(route, said)
        if stated is not None and stated != total:
            raise ValueError(f"{stated} prompt tokens, {report}")
        with self.out.lock:
            self.out.ended[route.path] += 1
            self.out.prompt_tokens += total
            self.out.reported.update({kind: report[kind] for kind in KINDS})


def report_or_none(event: dict) -> dict | None:
    try:
        return report_of(event)
    except KeyError:
        return None


def prompt_tokens(route: Route, said: list[dict]) -> int | None:
    """As the route itself states it; None where it does not."""
    for event in reversed(said):
        if "meta_info" in event:
            return event["meta_info"]["prompt_tokens"]
        if event.get("prompt_eval_count") is not None:
            return event["prompt_eval_count"]
        if route.usage:
            try:
                details_of(event, route.usage)
                usage = details_of(event, route.usage[:1])
            except (KeyError, TypeError):
                continue
            if "prompt_tokens" in usage:
                return usage["prompt_tokens"]
    return None


def stream_from(server: Server, seconds: float, clients: int, seed: int = 0) -> Streams:
    """Let the clients loose, and wait until all have ended."""
    out = Streams()
    model = served_name(server)
    until = time.monotonic() + seconds
    threads = [
        threading.Thread(target=Client(server, model, i, seed, out).run, args=(until,))
        for i in range(clients)
    ]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    return out


def counted(gained: Gained) -> Counter:
    """Prompt tokens by origin."""
    sums: Counter = Counter()
    for (kind, _), n in gained("sgl_blend:prompt_tokens_total", "kind", "source").items():
        sums[kind] += n
    return sums


def wrong_sums(gained: Gained, out: Streams) -> list[str]:
    """What does not add up: the counters here beside SGLang's, and beside the reports."""

    def same() -> bool:
        return counted(gained).total() == gained("sglang:prompt_tokens_total")[()]

    wrong = []
    if not eventually(same, 60.0):
        wrong.append(f"{counted(gained)} beside {gained('sglang:prompt_tokens_total')}")
    for kind in KINDS:
        if counted(gained)[kind] < out.reported[kind]:
            wrong.append(f"{kind}: {counted(gained)[kind]} counted, {out.reported[kind]} reported")
    if not out.reported["reused"]:
        wrong.append("nothing was reused")
    return wrong


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--dashboard", type=Path, help="draw what a Prometheus saw of it")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model = make_model(folder / "model", layers=4, hidden=64, heads=4)
        output = folder / "probe.jsonl"
        env = probe.install(folder / "probe", output)
        env |= {"OMP_NUM_THREADS": "1", "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_IDLE": "1"}
        server_args = ["--enable-blend", "--enable-metrics", "--max-total-tokens", "32768"]
        with launcher.serve(
            model, server_args, env=env, timeout=600.0, log=folder / "server.log"
        ) as server:
            gained = Gained(server)
            with contextlib.ExitStack() as stack:
                if args.dashboard is not None:
                    watch = stack.enter_context(Prometheus(folder, server.url))
                begun = time.monotonic()
                out = stream_from(server, args.seconds, args.clients)
                if args.dashboard is not None:
                    seen = picture().Prometheus(watch.url, time.monotonic() - begun, "15s")
                    picture().draw(seen, args.dashboard)
            wrong = [*out.problems, *wrong_sums(gained, out)]
            idle = probe.last_after(output, time.time() + 1.0)
            if idle["leak"] or idle["protected"] or idle["locked_nodes"] or idle["integrity"]:
                wrong.append(f"not clean: {idle}")
            outcomes = gained("sgl_blend:prompts_total", "outcome")
            said = {
                "clients": args.clients,
                "seconds": args.seconds,
                "ended": dict(out.ended),
                "vanished": dict(out.vanished),
                "prompt_tokens_reported": out.prompt_tokens,
                "reported": dict(out.reported),
                "counted": dict(counted(gained)),
                "counted_by_sglang": gained("sglang:prompt_tokens_total")[()],
                "outcomes": {k[0]: n for k, n in outcomes.items()},
                "idle": idle,
                "wrong": wrong[:40],
            }  # fmt: skip
    print(json.dumps(said, indent=1))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
