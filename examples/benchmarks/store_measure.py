"""What the sections of ``store_bench.py`` share: chunks of a size, clocks, tables, and the
baselines."""

from __future__ import annotations

import multiprocessing
import os
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import zmq

from sgl_blend.store.chunk import ChunkHeader, Layout, checksum, make_namespace

NAMESPACE = make_namespace("bench")
MIB = 1 << 20
# Twice 16 KiB a token and layer pair: a small model's bf16 KV; the chunk's size follows n_tokens.
LAYOUT = Layout(n_layers=16, n_kv_heads=8, head_dim=64, v_head_dim=64)
TOKEN_BYTES = LAYOUT.layer_bytes(1, "bfloat16") * LAYOUT.n_layers


def header_of(i: int, nbytes: int) -> ChunkHeader:
    key = i.to_bytes(8, "little") + checksum(i.to_bytes(8, "little"))
    return ChunkHeader(NAMESPACE, key, LAYOUT, "bfloat16", max(1, nbytes // TOKEN_BYTES))


def seconds(fn: Callable[[], object]) -> float:
    began = time.perf_counter()
    fn()
    return time.perf_counter() - began


def gbs(nbytes: int, times: list[float]) -> float:
    return nbytes / statistics.median(times) / 1e9


def percentile(times: list[float], q: float) -> float:
    return float(np.percentile(times, q))


@contextmanager
def realtime(on: bool, *pids: int | None):
    """Real-time scheduling for every thread of these processes and this one, while measuring.

    On a busy machine a round trip otherwise waits for another task's time slice, several ms each.
    All contestants get the same.
    """
    threads = [
        int(t) for pid in (os.getpid(), *pids) if pid for t in os.listdir(f"/proc/{pid}/task")
    ]

    def schedule(policy: int, priority: int) -> None:
        for thread in threads:
            with suppress(ProcessLookupError):
                os.sched_setscheduler(thread, policy, os.sched_param(priority))

    if on:
        schedule(os.SCHED_RR, 1)
    try:
        yield
    finally:
        if on:
            schedule(os.SCHED_OTHER, 0)


def show(row: dict) -> None:
    parts = [f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()]
    print("  " + "  ".join(parts), flush=True)


def table(rows: list[dict]) -> str:
    names = list(dict.fromkeys(k for row in rows for k in row))

    def cell(value) -> str:
        if value is None:
            return ""
        return f"{value:.3g}" if isinstance(value, float) else str(value)

    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    lines += ["| " + " | ".join(cell(r.get(n)) for n in names) + " |" for r in rows]
    return "\n".join(lines)


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


# Baselines.


def _frame_server(endpoint: str, bodies: list[np.ndarray]) -> None:
    """A plain ROUTER that answers the indices asked for with one frame each, without copies."""
    router = zmq.Context().socket(zmq.ROUTER)
    router.bind(endpoint)
    while True:
        identity, indices = router.recv_multipart()
        wanted = np.frombuffer(indices, dtype=np.int64)
        router.send_multipart([identity, *(bodies[i] for i in wanted)], copy=False)


@contextmanager
def frame_server(folder: str, bodies: list[np.ndarray]):
    endpoint = f"ipc://{folder}/frames"
    child = multiprocessing.get_context("fork").Process(
        target=_frame_server, args=(endpoint, bodies), daemon=True
    )
    child.start()
    context = zmq.Context()
    sock = context.socket(zmq.DEALER)
    sock.linger = 0
    sock.connect(endpoint)
    try:
        yield sock, child.pid
    finally:
        sock.close()
        context.term()
        child.kill()
        child.join()


@contextmanager
def redis_server(folder: str):
    """A Redis on a Unix socket without persistence, or None where it is not installed."""
    try:
        import redis
    except ImportError:
        yield None
        return
    if shutil.which("redis-server") is None:
        yield None
        return
    path = f"{folder}/redis.sock"
    child = subprocess.Popen(
        ["redis-server", "--port", "0", "--unixsocket", path, "--save", "", "--appendonly", "no"],
        stdout=subprocess.DEVNULL,
    )
    client = redis.Redis(unix_socket_path=path)
    for _ in range(200):
        try:
            client.ping()
            break
        except redis.exceptions.ConnectionError:
            time.sleep(0.05)
    client.pid = child.pid
    try:
        yield client
    finally:
        client.close()
        child.terminate()
        child.wait()
