"""The lab's hardware: QEMU in pure emulation, an AMD machine with SVM.

The flags are measured choices.  PVH entry needs no firmware.  With ``nokaslr`` and ``norandmaps``
QEMU can reuse translations.  Mitigations, page clearing and cipher self-tests only cost time here.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from pyvmm.errors import HostError
from pyvmm.linux.host import install_command, static_busybox

BINARY = "qemu-system-x86_64"
PORT_NUMBERS = {"terminal": 0, "in": 1, "out": 2, "err": 3, "control": 4}
"""The virtio-serial ports; ``init.sh`` knows the numbers too.  0 can be a console: hvc0."""

CPU = (
    "max,+svm,-la57,-cx16,-xsave,-xsaveopt,-xsavec,-xsaves,-xgetbv1,-avx,-avx2,-fma,-f16c,-vaes,"
    "-vpclmulqdq,-mpx,-pku"
)
"""Four-level paging is cheaper to emulate.  xsave is left out because QEMU's SVM does not intercept
XSETBV: a guest's guest would change state that its KVM does not know of, and Linux there warns of
it.  QEMU keeps the features that depend on xsave, and Linux would use these, so they are removed by
name."""

ACCELERATOR = "tcg,thread=multi,tb-size=128"
"""QEMU keeps at most 128 MiB of translated code; its own choice is 1 GiB.  When a page is written,
QEMU looks for stale code that was translated from that page.  In labs where guests had come and
gone, this took so long that no process ran for 4 to 38 s while Linux cleared a new guest's RAM."""

KERNEL_COMMAND_LINE = (
    "console=ttyS0 panic=-1 tsc=reliable nokaslr norandmaps mitigations=off init_on_alloc=0 "
    "cryptomgr.notests no_timer_check"
)
"""no_timer_check: Linux waits some ticks for the timer, and panics if QEMU gets no time on a busy
host just then ("IO-APIC + timer doesn't work")."""


def find_busybox() -> Path:
    """Return the static busybox; HostError, with the one remedy, if a package is missing."""
    busybox = static_busybox()
    missing = []
    if shutil.which(BINARY) is None:
        missing.append("qemu-system-x86")
    if busybox is None:
        missing.append("busybox-static")
    if busybox is None or missing:
        verb = "is" if len(missing) == 1 else "are"
        raise HostError(
            f"lab: {' and '.join(missing)} {verb} missing; run: {install_command(missing)}"
        )
    return busybox


def command_line(
    *,
    vmlinux: Path,
    initramfs_fd: int,
    cpus: int,
    memory_bytes: int,
    writable: Sequence[Path],
    ports: Mapping[str, int],
    quiet: bool,
) -> list[str]:
    """Return QEMU's arguments; ``ports`` are the connected sockets that it inherits, by name.

    The console is its standard output, a pipe: a socket would lose bytes written one by one.
    """
    append = KERNEL_COMMAND_LINE + (" quiet loglevel=4" if quiet else "")
    # setpriv: QEMU dies with us even when we are killed by SIGKILL.
    arguments = [
        "setpriv", "--pdeathsig", "KILL", BINARY,
        "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-vga", "none",
        "-M", "q35,usb=off,sata=off,smbus=off", "-accel", ACCELERATOR,
        "-cpu", CPU, "-smp", str(cpus), "-m", str(memory_bytes >> 20),
        "-kernel", str(vmlinux), "-initrd", f"/proc/self/fd/{initramfs_fd}", "-append", append,
        "-chardev", "stdio,id=console,signal=off", "-serial", "chardev:console",
        # The first virtio device, so that Linux calls its ports vport0pN.
        "-device", "virtio-serial-pci,id=serial",
        *_shared_directory("host", Path("/"), read_only=True),
    ]  # fmt: skip
    for index, directory in enumerate(writable):
        arguments += _shared_directory(f"w{index}", directory, read_only=False)
    # In ascending order: once the last port is connected, /init knows that all are.
    for name in sorted(ports, key=PORT_NUMBERS.__getitem__):
        kind = "virtconsole" if name == "terminal" else "virtserialport"
        arguments += [
            "-chardev", f"socket,id={name},fd={ports[name]}",
            "-device", f"{kind},bus=serial.0,nr={PORT_NUMBERS[name]},chardev={name}",
        ]  # fmt: skip
    return arguments


def _shared_directory(tag: str, directory: Path, *, read_only: bool) -> list[str]:
    path = str(directory).replace(",", ",,")
    options = f"local,id={tag},path={path},security_model=none,multidevs=remap"
    return [
        "-fsdev", options + (",readonly=on" if read_only else ""),
        "-device", f"virtio-9p-pci,fsdev={tag},mount_tag={tag}",
    ]  # fmt: skip
