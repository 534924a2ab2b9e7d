"""Telling the guest of its machine, before it runs, from what is on the board.

A device that is plugged in is announced; nothing else is.  The MP table alone does not depend on
the devices: it gives every interrupt line, because it has no way to say whose a line is.
"""

from __future__ import annotations

from pyvmm.board.board import Board
from pyvmm.config import RunConfig
from pyvmm.x86 import layout
from pyvmm.x86.acpi import VirtioMmioDevice, write_acpi_tables
from pyvmm.x86.image import Kernel
from pyvmm.x86.loader import write_boot_info
from pyvmm.x86.mptable import write_mp_table
from pyvmm.x86.reset_vector import write_reset_vector


def describe(
    board: Board, config: RunConfig, kernel: Kernel, initrd: tuple[int, int] | None
) -> None:
    """Write the MP table, ACPI's tables, the command line and the boot information.

    ``initrd`` is what ``load_initrd`` returned.  ConfigError if the command line, with the devices
    of the board, is longer than ``kernel`` takes.
    """
    places = [(slot.base, slot.gsi) for slot in board.slots]
    cmdline = config.kernel_command_line(places, limit=kernel.cmdline_limit)
    write_mp_table(board.memory, cpus=config.cpus)
    rsdp = 0
    # A kernel with ACPI knows interrupt lines by it only, so it gets all of ACPI or nothing.
    if config.discovery != "cmdline":
        rsdp = write_acpi_tables(
            board.memory, vcpu_count=config.cpus,
            rtc=board.pio.find(layout.RTC_INDEX) is not None,
            devices=[
                VirtioMmioDevice(base=base, length=layout.VIRTIO_MMIO_STRIDE, gsi=gsi)
                for base, gsi in places
            ],
        )
        board.vmgenid.show()
    write_reset_vector(board.memory)
    write_boot_info(board.memory, kernel, cmdline, initrd, rsdp=rsdp)
