"""The bench's rows of snapshots, once each: that they measure, not what."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.host import Host
from bench.peers import Contender
from bench.rows import snapshot

pytestmark = pytest.mark.bare


def test_every_figure_is_measured_for_both(tmp_path: Path) -> None:
    host = Host(tmp_path, 0.3)
    for suite in snapshot.suites(Contender(name="pyvmm")):
        if suite.sample is snapshot.sample_pause:
            continue  # 13 s of writing RAM
        for contender in suite.contenders:
            readings = suite.sample(host, contender, [])
            assert set(readings) == {figure.key for figure in suite.figures}
            assert all(0 < reading.value < 60_000 for reading in readings.values())
