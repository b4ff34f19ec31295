"""Many streaming clients at once, some of which vanish; ``streaming.py`` by hand runs as long as
one likes. Needs: CPU, a real server."""

from __future__ import annotations

from scraping import Gained
from streaming import STREAMS, stream_from, wrong_sums


def test_streams_end_whole_and_the_counters_add_up(packed):
    gained = Gained(packed)
    out = stream_from(packed, seconds=4.0, clients=64)
    assert not out.problems, "\n".join(out.problems[:20])
    assert out.ended and out.vanished and out.ended.keys() <= {route.path for route in STREAMS}
    assert not wrong_sums(gained, out)
