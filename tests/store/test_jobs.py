"""Worker lanes: results come back to the loop, which is not woken for each of them."""

from __future__ import annotations

import os
import select
import threading

import pytest
from polling import eventually

from sgl_blend.store.placement.jobs import Jobs


@pytest.fixture
def jobs():
    made = Jobs({"one": 1, "many": 3})
    yield made
    made.close()


def run(jobs: Jobs) -> int:
    """Drain until nothing is pending; returns how often the loop was woken."""
    woken = 0
    while jobs.pending:
        assert select.select([jobs.fileno()], [], [], 10)[0], "nobody woke the loop"
        woken += 1
        jobs.drain()
    return woken


def test_each_job_is_answered_once_with_its_result_or_its_error(jobs):
    got = {}
    for i in range(200):
        jobs.submit(
            "many",
            lambda i=i: 10 // (i % 4),
            lambda r, e, i=i: got.setdefault(i, []).append((r, e)),
        )
    run(jobs)
    assert sorted(got) == list(range(200))
    for i, answers in got.items():
        ((result, error),) = answers
        if i % 4:
            assert result == 10 // (i % 4) and error is None
        else:
            assert result is None and isinstance(error, ZeroDivisionError)


def test_a_lane_of_one_thread_keeps_the_order(jobs):
    done = []
    for i in range(50):
        jobs.submit("one", lambda i=i: i, lambda r, _: done.append(r))
    run(jobs)
    assert done == list(range(50))


def test_many_small_jobs_wake_the_loop_a_few_times(jobs):
    gate = threading.Event()
    jobs.submit("one", gate.wait, lambda *_: None)
    for _ in range(2000):
        jobs.submit("one", lambda: None, lambda *_: None)
    gate.set()
    assert run(jobs) < 500


def test_close_drops_what_has_not_begun(jobs):
    before = threading.active_count()
    begun, gate, ran = threading.Event(), threading.Event(), []

    def first() -> None:
        begun.set()
        gate.wait()

    jobs.submit("one", first, lambda *_: None)
    jobs.submit("one", lambda: ran.append(1), lambda *_: None)
    assert begun.wait(10)
    wake = jobs.fileno()
    jobs.close()
    jobs.close()
    # What was its descriptor may be anybody's by now.
    null = os.open(os.devnull, os.O_RDWR)
    if null != wake:
        os.dup2(null, wake)
        os.close(null)
    try:
        gate.set()
        assert eventually(lambda: threading.active_count() == before - 4)
        assert ran == []
    finally:
        os.close(wake)
