"""``python -m tests.support.plain_rings FEATURE,FEATURE... run ...``: pyvmm without some features.

Linux takes every ring feature that is offered, so this is how a guest comes to use the others.  A
number among them is the most entries that QueueNumMax shows: Linux fills a ring as far as it may,
so this is how a guest comes to set a smaller QueueNum.
"""

from __future__ import annotations

import functools
import operator
import sys

from pyvmm.cli.main import main
from pyvmm.virtio.block import config
from pyvmm.virtio.mmio import MmioTransport
from pyvmm.virtio.spec import Feature, Register


def show_shorter_rings(most: int) -> None:
    """Have QueueNumMax say ``most``; the device knows nothing of it."""
    show = MmioTransport._show

    def show_less(self: MmioTransport, register: Register, value: int) -> None:
        show(self, register, min(value, most) if register == Register.QUEUE_NUM_MAX else value)

    MmioTransport._show = show_less  # type: ignore[method-assign]


if __name__ == "__main__":
    words, *arguments = sys.argv[1:]
    names = [word for word in words.split(",") if word and not word.isdigit()]
    for size in filter(str.isdigit, words.split(",")):
        show_shorter_rings(int(size))
    disabled = functools.reduce(operator.or_, (Feature[name] for name in names), 0)
    config.BlockConfig = functools.partial(  # type: ignore[assignment, misc]
        config.BlockConfig, disabled_features=int(disabled)
    )
    sys.exit(main(arguments))
