"""Two front ends of one export: one to misbehave, one at work that must not notice."""

from __future__ import annotations

import os
from pathlib import Path

from pyvmm.virtio.block import BlockConfig
from pyvmm.virtio.spec import Feature
from tests.support.vhost_rig import QUEUE_SIZE, ExportRig
from tests.support.virtio_driver import BlockDriver

IN = 0


class Pair:
    """An export of a read-only disk with two front ends: one to misbehave, one at work."""

    def __init__(self, path: Path) -> None:
        config = BlockConfig(queues=2, queue_size=QUEUE_SIZE, read_only=True)
        self.rig = ExportRig(path, config=config)
        self.good = self.rig.connect()
        self.driver: BlockDriver = self.good.start(int(Feature.VERSION_1))
        self.bad = self.rig.connect()

    def assert_hung_up(self, problem: str) -> None:
        """The bad one is out with one report that says ``problem``, the good one at work."""
        assert self.bad.is_closed()
        self.assert_reported(problem)

    def assert_reported(self, problem: str) -> None:
        """One line names the socket, the front end's process and ``problem``."""
        assert len(self.rig.reports) == 1, self.rig.reports
        assert self.rig.reports[0].startswith(f"{self.rig.path}: front end (pid {os.getpid()}): ")
        assert problem in self.rig.reports[0]
        assert self.driver.request(IN, 5, room=512).data == b"\5" * 512
