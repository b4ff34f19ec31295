"""``sgl-blend top`` on figures that are given to it. CPU; a real server is in
tests/server/test_tools_server.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from metrics_server import MetricsServer

from sgl_blend.cli.main import main
from sgl_blend.cli.observe import Observer, Samples
from sgl_blend.cli.table import plain
from sgl_blend.cli.top import picture
from sgl_blend.errors import StoreError
from sgl_blend.harness.client import Client, ServerError

INFO = {
    "model_path": "/models/llama",
    "served_model_name": "llama",
    "version": "0.5.23",
    "radix_cache_backend": "blend",
    "enable_metrics": True,
}
STATS = {
    "chunks": 3,
    "memory_used": 1 << 30,
    "memory_limit": 4 << 30,
    "disk_used": 0,
    "disk_limit": 0,
    "read_only": False,
    "draining": False,
    "shm_exhausted": 0,
    "counters": {"lookup_keys": 10, "lookup_hits": 4},
}


def metrics(scale: int = 1, more: str = "") -> str:
    """As a server with two tensor-parallel ranks and two data-parallel ones says it."""
    lines = []
    for kind, source, n in (
        ("prefix", "device", 100),
        ("reused", "device", 400),
        ("reused", "disk", 200),
        ("recomputed", "device", 60),
        ("computed", "", 240),
    ):
        for rank in (0, 1):
            labels = f'model_name="llama",tp_rank="{rank}",kind="{kind}",source="{source}"'
            lines.append(f"sgl_blend:prompt_tokens_total{{{labels}}} {n * scale}")
    lines += [
        f'sglang:num_requests_total{{is_streaming="True"}} {4 * scale}',
        f'sglang:num_requests_total{{is_streaming="False"}} {6 * scale}',
        f"sglang:time_to_first_token_seconds_sum {2.0 * scale}",
        f"sglang:time_to_first_token_seconds_count {10 * scale}",
        'sglang:num_running_reqs{dp_rank="0"} 2',
        'sglang:num_running_reqs{dp_rank="1"} 1',
        "sglang:max_total_num_tokens 4096",
        "sglang:kv_available_tokens 1024",
        'sgl_blend:fallback_total{reason="no reusable tokens",tp_rank="0"} 7',
        'sgl_blend:fallback_total{reason="images",tp_rank="0"} 9',
        'sgl_blend:fallback_total{reason="images",tp_rank="1"} 9',
        'sgl_blend:store_errors_total{call="lookup",reason="late",tp_rank="0"} 1',
        'sgl_blend:ttft_saved_seconds_sum{tp_rank="0"} 3.5',
        'sgl_blend:ttft_saved_seconds_count{tp_rank="0"} 7',
        'sgl_blend:measured_ttft_seconds_sum{dp_rank="0",tp_rank="0",way="exact"} 1.5',
        'sgl_blend:measured_ttft_seconds_sum{dp_rank="1",tp_rank="0",way="exact"} 2.5',
        'sgl_blend:measured_ttft_seconds_count{dp_rank="0",tp_rank="0",way="exact"} 2',
        'sgl_blend:measured_ttft_seconds_count{dp_rank="1",tp_rank="0",way="exact"} 3',
        'sgl_blend:measured_ttft_seconds_sum{dp_rank="0",tp_rank="0",way="blended"} 10',
        'sgl_blend:measured_ttft_seconds_count{dp_rank="0",tp_rank="0",way="blended"} 40',
        'sgl_blend:gate_state{tp_rank="0"} 1',
        'sgl_blend:gate_ratio{tp_rank="0"} 0.1',
        'sgl_blend:gate_kl{tp_rank="0"} 0.02',
    ]
    return "\n".join([*lines, more]) + "\n"


class Store:
    def __init__(self, stats: dict | Exception) -> None:
        self._stats = stats

    def __enter__(self):
        return self

    def __exit__(self, *_exc):
        return None

    def stats(self) -> dict:
        if isinstance(self._stats, Exception):
            raise self._stats
        return self._stats


@pytest.fixture
def fake():
    about = {"version": "0.1.0", "store": "ipc:///somewhere"}
    with MetricsServer(server_info=INFO, blend_info=about, metrics=metrics()) as server:
        yield server


def look(fake, stats: dict | Exception = STATS, ticks=(0.0, 2.0, 4.0)):
    asked: list = []

    def open_store(endpoint):
        asked.append(endpoint)
        return Store(stats)

    clock = iter(ticks)
    return Observer(Client(fake.url), open_store, clock=lambda: next(clock)), asked


def test_samples_of_the_first_rank_add_up():
    s = Samples(metrics())
    assert s.total("sgl_blend:prompt_tokens_total", kind="reused") == 600
    assert s.total("sglang:num_running_reqs") == 3
    assert s.total("sglang:nothing") is None
    assert s.by("sgl_blend:fallback_total", "reason") == {"images": 9, "no reusable tokens": 7}
    by_source = s.by("sgl_blend:prompt_tokens_total", "source", kind="reused")
    assert by_source == {"device": 400, "disk": 200}
    # A gauge of several data-parallel ranks is no sum.
    assert s.worst("sglang:num_running_reqs", min) == 1 and s.worst("nothing", min) is None
    assert list(s.by("sgl_blend:fallback_total", "reason")) == ["images", "no reusable tokens"]


def test_a_frame(fake):
    observer, asked = look(fake)
    frame = observer.frame()
    assert (frame.model, frame.version, frame.blending) == ("llama", "0.5.23", True)
    assert frame.tokens == {"prefix": 100, "reused": 600, "recomputed": 60, "computed": 240}
    assert frame.not_computed == 0.7 and frame.ttft_s == 0.2 and frame.running == 3
    assert frame.sources == {"device": 400, "disk": 200}
    assert (frame.saved_s, frame.blended) == (3.5, 7)
    assert frame.measured == {"blended": (40, 0.25), "exact": (5, 0.8)}
    assert frame.recent == {} and frame.notes == ()
    assert asked == ["ipc:///somewhere"] == [frame.store]
    device, memory = frame.tiers
    assert (device.used, device.limit, device.hits) == (3072, 4096, 0.7)
    assert (memory.used, memory.limit, memory.hits) == (1 << 30, 4 << 30, 0.4)
    assert frame.errors == {"lookup, late": 1}


def test_rates_are_of_the_time_between_two_frames(fake):
    observer, _ = look(fake)
    observer.frame()
    fake.answers["/metrics"] = metrics(3)
    frame = observer.frame()
    assert frame.recent["requests"] == 10.0 and frame.recent["tokens"]["reused"] == 600.0
    assert frame.recent["ttft_s"] == pytest.approx(0.2)
    # A server that was started again counts from zero: no rate below it.
    fake.answers["/metrics"] = metrics(1)
    assert observer.frame().recent == {}


def test_the_picture_shows_all_of_it(fake):
    text = plain(picture(look(fake)[0].frame()), 100)
    for words in (
        "llama at http://127.0.0.1",
        "SGLang 0.5.23: blending",
        "3 running, - waiting, 10 done",
        "0.200 s (mean of all)",
        "ratio 0.1, KL 0.02",
        "saved by blending: 3.5 s over 7 prompts, 0.500 s each (estimate)",
        "measured: 0.800 s exact (5 prompts), 0.250 s blended (40 prompts): 0.550 s saved",
        "reused from: device 400, disk 200",
        "60.0%",
        "3,072 tokens",
        "1 GiB",
        "fell back to full prefill: images 9, no reusable tokens 7",
        "store errors: lookup, late 1",
    ):
        assert words in text, text
    assert all(len(line) <= 100 for line in text.splitlines())


def test_a_gate_that_turned_blending_off_is_said_first(fake):
    fake.answers["/metrics"] = metrics().replace(
        'gate_state{tp_rank="0"} 1', 'gate_state{tp_rank="0"} 0'
    )
    assert "blending is OFF" in plain(picture(look(fake)[0].frame())).splitlines()[0]


@pytest.mark.parametrize(
    ("change", "note"),
    [
        ({"/server_info": {**INFO, "enable_metrics": False}}, "--enable-metrics"),
        ({"/server_info": {**INFO, "radix_cache_backend": None}}, "--enable-blend"),
        ({"/metrics": None}, "no metrics"),
        ({"/blend_info": None}, "--at"),
        ({"/blend_info": {"store": None}}, "no store of its own"),
    ],
)
def test_what_cannot_be_read_leaves_a_note_and_the_rest(fake, change, note):
    fake.answers |= change
    frame = look(fake)[0].frame()
    assert any(note in n for n in frame.notes), frame.notes
    assert note in plain(picture(frame))


@pytest.mark.parametrize(
    ("stats", "note"),
    [
        (StoreError("forbidden"), "forbidden"),
        ({**STATS, "read_only": True}, "read-only"),
        ({**STATS, "counters": {"corrupt": 2}}, "2 damaged chunks"),
    ],
)
def test_a_store_that_is_not_well(fake, stats, note):
    frame = look(fake, stats)[0].frame()
    assert any(note in n for n in frame.notes) and frame.tokens


def test_nobody_there():
    with pytest.raises(ServerError, match="no answer"):
        Observer(Client("http://127.0.0.1:9"), lambda _: None).frame()


def test_the_command(fake, capsys, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    fake.answers["/blend_info"] = {"store": f"ipc://{tmp_path}/nobody"}
    words = ["top", "--url", fake.url, "--api-key", "secret"]
    assert main([*words, "--json"]) == 0
    out = capsys.readouterr().out
    assert json.loads(out)["not_computed"] == 0.7
    assert fake.headers["Authorization"] == "Bearer secret"
    assert main([*words, "--once"]) == 0
    assert "statistics cannot be had" in capsys.readouterr().out
    assert main([*words, "--interval", "0"]) == 2
    assert main(["top", "--url", "http://127.0.0.1:9", "--once"]) == 2
