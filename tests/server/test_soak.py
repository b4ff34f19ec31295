"""A short soak; ``soak.py`` by hand runs as long as one likes. Needs: CPU, a real server."""

from __future__ import annotations

from soak import soak, verdict

SECONDS = 60.0


def test_mixed_traffic_leaves_a_clean_server(tmp_path):
    figures = soak(SECONDS, tmp_path)
    assert not verdict(figures), "\n".join(verdict(figures)[:20])
    assert {"blend", "exact", "all", "drop", "abort", "score"} <= figures.requests.keys()
