"""A Linux guest in QEMU, its CPU emulated, whose disk is served by a vhost-user-blk back end.

The kernel is Debian's, as ``pyvmm lab`` unpacks it, here with the modules of a PCI disk.  The root
is build/tools.img by QEMU's own virtio-blk, read-only: /dev/vda; the disk under test is
vhost-user-blk-pci: /dev/vdb.  Guest RAM is a sealed memfd, which back ends are given to map.
"""

from __future__ import annotations

import functools
import json
import os
import select
import stat
import subprocess
import time
from pathlib import Path
from socket import socketpair
from types import TracebackType

from pyvmm.lab import kernel, qemu
from pyvmm.linux.cache import cache_directory
from pyvmm.linux.cpio import pack_cpio
from tests.support.guest import TOOLS, run_in_guest
from tests.support.patience import patient

MODULES = ("virtio_pci", "virtio_blk", "crc32c_generic", "ext4")
EXIT_PORT = 0xF4  # where guest/init writes its status
# Far above what these guests take (3-10 s), and below pytest's own timeout.
TIMEOUT_S = 100.0

INIT = """\
#!/bin/busybox sh
export PATH=/bin
mount -t devtmpfs devtmpfs /dev
exec </dev/console >/dev/console 2>&1
for module in /modules/*; do insmod "$module" || echo "cannot load $module"; done
mount -t ext4 -o ro /dev/vda /new && mount -t devtmpfs devtmpfs /new/dev &&
  exec switch_root /new /sbin/init
echo "no root"
"""
APPLETS = ("insmod", "mount", "switch_root")
DIRECTORIES = ("bin", "dev", "modules", "new")


def guest_kernel() -> kernel.Kernel:
    """Debian's kernel with ``MODULES``, from the cache that ``pyvmm lab`` uses."""
    build = functools.partial(kernel.build_from_debian, wanted=MODULES)
    return kernel.obtain(cache_directory() / "+".join(MODULES), print, build)


def _initramfs(loaded: tuple[Path, ...]) -> bytes:
    """What loads ``loaded`` and gives way to build/tools.img."""
    entries = [(name, stat.S_IFDIR | 0o755, b"") for name in DIRECTORIES]
    entries += [(f"bin/{name}", stat.S_IFLNK | 0o777, b"busybox") for name in APPLETS]
    entries += [
        ("init", stat.S_IFREG | 0o755, INIT.encode()),
        ("bin/busybox", stat.S_IFREG | 0o755, qemu.find_busybox().read_bytes()),
    ]
    entries += [
        (f"modules/{path.name}", stat.S_IFREG | 0o644, path.read_bytes()) for path in loaded
    ]
    return pack_cpio(entries)


class QemuGuest:
    """A running guest that our init tells to run ``script``, talked to by lines of its console.

    To be used as a context manager; QEMU is dead when it is left.  ``device``, ``chardev`` and
    ``memory`` add properties of vhost-user-blk-pci, its socket and the guest's RAM.  There are as
    many queues as ``cpus``.
    """

    def __init__(
        self,
        socket: Path,
        script: str,
        *,
        cpus: int = 1,
        device: str = "",
        chardev: str = "",
        memory: str = "",
    ) -> None:
        linux = guest_kernel()
        ours, theirs = socketpair()
        ours.settimeout(patient(TIMEOUT_S))
        with ours:
            self._qmp = ours.makefile("rwb", buffering=0)
        self._qmp.write(b'{"execute": "qmp_capabilities"}\n')
        archive = os.memfd_create("initramfs")
        with theirs, os.fdopen(archive, "wb") as file:
            file.write(_initramfs(linux.modules))
            file.flush()
            self.process = subprocess.Popen(
                [
                    "setpriv", "--pdeathsig", "KILL", qemu.BINARY,
                    "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none",
                    "-M", "q35,usb=off,sata=off,smbus=off,memory-backend=ram",
                    "-object", f"memory-backend-memfd,id=ram,size=256M,share=on{memory}",
                    "-accel", "tcg,thread=multi", "-cpu", qemu.CPU, "-smp", str(cpus),
                    "-m", "256M", "-kernel", str(linux.vmlinux),
                    "-initrd", f"/proc/self/fd/{archive}",
                    "-append", f"{qemu.KERNEL_COMMAND_LINE} quiet loglevel=4 "
                               + run_in_guest("mount -t tmpfs t /mnt; " + script),
                    "-chardev", "stdio,id=console,signal=off", "-serial", "chardev:console",
                    "-chardev", f"socket,id=monitor,fd={theirs.fileno()}",
                    "-mon", "chardev=monitor,mode=control",
                    "-device", f"isa-debug-exit,iobase={EXIT_PORT},iosize=1",
                    "-drive", f"file={TOOLS},format=raw,if=none,id=root,read-only=on",
                    "-device", "virtio-blk-pci,drive=root,addr=3",
                    "-chardev", f"socket,id=disk,path={socket}{chardev}",
                    "-device", f"vhost-user-blk-pci,chardev=disk,addr=4{device}",
                ],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                pass_fds=[archive, theirs.fileno()],
            )  # fmt: skip
        self.console = ""
        self._seen = 0
        self._deadline = time.monotonic() + patient(TIMEOUT_S)

    def __enter__(self) -> QemuGuest:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.kill()

    def kill(self) -> None:
        """SIGKILL, as a machine's power goes; not an error if QEMU has ended."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()
        self._qmp.close()

    def execute(self, command: str) -> None:
        """Have QEMU do ``command``, such as stop or cont (its QMP); done when this returns."""
        self._qmp.write(json.dumps({"execute": command, "id": command}).encode() + b"\n")
        # Before its answer come the greeting, the answer to qmp_capabilities, and events.
        while (answer := json.loads(self._qmp.readline())).get("id") != command:
            pass
        assert "return" in answer, answer

    def wait_for(self, start: str) -> str:
        """The next line of the console that begins with ``start``."""
        while True:
            line, newline, _ = self.console[self._seen :].partition("\n")
            if newline:
                self._seen += len(line) + 1
                if line.startswith(start):
                    return line
            elif not self._read():
                raise AssertionError(f"the guest ended without {start!r}: {self.console}")

    def type(self, text: str) -> None:
        """What the script finds on its standard input."""
        assert self.process.stdin is not None
        self.process.stdin.write(text.encode())
        self.process.stdin.flush()

    def end(self) -> int:
        """QEMU's own exit status, waited for."""
        while self._read():
            pass
        return self.process.wait(patient(10))

    def status(self) -> int:
        """The exit status of the script, waited for; AssertionError if there was none."""
        code = self.end()
        # isa-debug-exit ends QEMU with twice the byte, plus one.
        assert code & 1, f"QEMU ended with {code}: {self.console}"
        assert "pyvmm-init: status" in self.console, self.console
        return code >> 1

    def _read(self) -> bool:
        """Take what the console has to say next; False at its end."""
        assert self.process.stdout is not None
        fd = self.process.stdout.fileno()
        ready, _, _ = select.select([fd], [], [], max(0, self._deadline - time.monotonic()))
        assert ready, f"nothing more after {TIMEOUT_S} s: {self.console}"
        data = os.read(fd, 65536).decode(errors="replace")
        self.console += data.replace("\r", "")
        return bool(data)


def run_to_end(
    socket: Path, script: str, *, cpus: int = 1, device: str = "", memory: str = ""
) -> str:
    """Run ``script`` in a guest of its own, to status 0; its console."""
    with QemuGuest(socket, script, cpus=cpus, device=device, memory=memory) as guest:
        assert guest.status() == 0, guest.console
        return guest.console
