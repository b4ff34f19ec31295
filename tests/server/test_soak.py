"""A short soak; ``soak.py`` by hand runs as long as one likes. Needs: CPU, a real server."""

from __future__ import annotations

from soak import Traffic, soak, verdict

SECONDS, AT_MOST = 25.0, 180.0


def test_mixed_traffic_leaves_a_clean_server(tmp_path):
    figures = soak(SECONDS, tmp_path, at_most=AT_MOST)
    assert not verdict(figures), "\n".join(verdict(figures)[:20])
    assert figures.requests.keys() >= set(Traffic.KINDS)
