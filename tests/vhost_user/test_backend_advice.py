"""Everything an export advises is served, whatever size the front end gives its rings after it
has read the configuration space."""

from __future__ import annotations

from pathlib import Path

import pytest

from pyvmm.storage.memory import MemoryBackend
from pyvmm.vhost_user.protocol import CONFIG, Request
from pyvmm.virtio.block import BlockConfig
from pyvmm.virtio.spec import BlockFeature, Feature
from tests.support.advised import Advice, Asker, check_ranges, check_transfers
from tests.support.vhost_rig import FEATURES, PACKED, ExportRig, ScriptedFrontend

RANGES = int(BlockFeature.DISCARD | BlockFeature.WRITE_ZEROES)
SPLIT_SIZES = [2, 4, 8, 16, 32, 64, 128, 256, 512, 1024]
PACKED_SIZES = [2, 3, 4, 5, 7, 16, 31, 64, 100, 127, 128, 129, 200, 255, 256, 600, 1023, 1024]
QEMUS_DEFAULT = 128


def advice_of(frontend: ScriptedFrontend) -> Advice:
    """What the configuration space says now."""
    space = frontend.ask(Request.GET_CONFIG, CONFIG.pack(0, 60, 0) + bytes(60))
    return Advice.of(space[CONFIG.size :])


@pytest.mark.parametrize("most", [4, 64, 256, 1024])
@pytest.mark.parametrize("indirect", [True, False], ids=["indirect", "direct"])
@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
def test_fault_12_an_export_serves_what_it_advises_in_a_ring_of_any_size(
    tmp_path: Path, packed: bool, indirect: bool, most: int
) -> None:
    features = (PACKED if packed else FEATURES) | RANGES
    features &= ~(0 if indirect else int(Feature.INDIRECT_DESC))
    backend = MemoryBackend(bytearray(256 << 10))
    config = BlockConfig(queue_size=most)
    sizes = [size for size in (PACKED_SIZES if packed else SPLIT_SIZES) if size <= most]
    with ExportRig(tmp_path / "socket", config=config, backend=backend) as rig:
        for size in sizes:
            frontend = rig.connect()
            frontend.negotiate(features)
            advice = advice_of(frontend)
            frontend.share()
            driver = frontend.driver(size=size)
            frontend.set_up(driver)
            frontend.run()
            asker = Asker(driver, indirect=indirect)
            check_transfers(asker, advice)
            check_ranges(asker, advice)
            assert advice_of(frontend) == advice
            frontend.hang_up()
        assert rig.reports == []


@pytest.mark.parametrize("most", [16, 128, 256, 1024])
def test_fault_12_what_an_export_advises_fits_the_rings_that_qemu_makes(
    tmp_path: Path, most: int
) -> None:
    """Without tables a longer chain finds no room in the ring, and Linux waits for ever."""
    with ExportRig(tmp_path / "socket", config=BlockConfig(queue_size=most)) as rig:
        frontend = rig.connect()
        frontend.negotiate()
        advice = advice_of(frontend)
    assert advice.seg_max == min(most, QEMUS_DEFAULT) - 2
    assert advice.size_max >= 1 << 20
