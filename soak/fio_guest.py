"""A Linux on four vCPUs that writes and checks seven disks of all kinds, and is watched.

Each disk has a loop of its own in the guest.  A pass of fio writes a disk at random places and
reads every byte back; it says ``passed DISK``, or ``broken DISK``.  The disk with a fault script is
read where it fails as well, and each such read must fail.  The NBD server of one disk is killed
early: from then on every request must fail, and nothing else may.

Each pass has a seed of its own, so that a block of the pass before is found out.  fio 3.33 loses
count of its own seeds where requests of several sizes are read and written: so one pass writes them
and reads them back, and the next one reads and writes at once, in one size.
"""

from __future__ import annotations

import base64
import contextlib
import json
import re
import socket
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from soak.errors import TrialError
from soak.processes import END_S, killed_at_last, pyvmm
from soak.records import new_disk
from soak.usage import Usage
from tests.support.export_process import Export
from tests.support.guest import KERNEL, MIB, ROOT_DISK, run_in_guest
from tests.support.nbd_servers import qemu_nbd
from tests.support.patience import patient

RAM_MIB = 256
CPUS = 4
DISK_MIB = 16
BOOT_S = 180.0
FINISH_S = 300.0
BAD_SECTORS = "24576-24583"
BAD_BLOCK = 24576 // 8
"""In blocks of 4 KiB, behind all that fio writes."""
FAULTS = f"""\
any 7+ sectors 0-63: delay 0.002
write * sectors {BAD_SECTORS}: ENOSPC
read * sectors {BAD_SECTORS}: EIO
"""
SCRIPT = r"""
mount -t tmpfs -o size=90% t /mnt; dmesg -n 1
dd if=/dev/zero of=/mnt/fill bs=1M count=@FILL@ 2>/dev/null; rm /mnt/fill
(read line; touch /mnt/stop) </dev/console &
on_time() { [ ! -e /mnt/stop ]; }
pass() {
  mix="--rw=randwrite --bs=4k-64k"; [ $(($3 % 2)) = 1 ] || mix="--rw=randrw --bs=16k"
  fio --name=t --filename=$2 $mix --iodepth=16 --ioengine=libaio --direct=1 --verify=crc32c \
    --verify_fatal=1 --randseed=$3 --size=4m --minimal --aux-path=/mnt --fdatasync=32 \
    >/mnt/$1.said 2>&1 && grep -q ';t;0;0;' /mnt/$1.said
}
work() {
  n=0
  while on_time; do
    n=$((n + 1))
    if pass $1 $2 $n; then echo passed $1; else echo broken $1; cat /mnt/$1.said; return; fi
  done
}
/sbin/mke2fs -q -t ext4 /dev/vdc; mkdir /mnt/fs; mount /dev/vdc /mnt/fs
work vdb /dev/vdb & work vdc /mnt/fs/f & work vdd /dev/vdd & work vde /dev/vde &
work vdf /dev/vdf &
while on_time; do
  if dd if=/dev/vdf of=/dev/null bs=4k skip=@BAD@ count=1 iflag=direct 2>/dev/null; then
    echo broken vdf-read
  fi
  if dd if=/dev/zero of=/dev/vdf bs=4k seek=@BAD@ count=1 oflag=direct 2>/dev/null; then
    echo broken vdf-write
  fi
  if ! dd if=/dev/vdf of=/dev/null bs=4k skip=$((@BAD@ + 1)) count=1 iflag=direct 2>/dev/null; then
    echo broken vdf-beside
  fi
  echo failed vdf; sleep 1
done &
while on_time && pass vdg /dev/vdg 1; do echo passed vdg; done &
wait
if dd if=/dev/vdg of=/dev/null bs=4k count=1 iflag=direct 2>/dev/null; then echo broken vdg-lost; fi
umount /mnt/fs && /sbin/e2fsck -fn /dev/vdc >/dev/null 2>&1 && echo clean vdc
echo finished
"""
_WORD = re.compile(r"^(passed|failed|broken|clean|finished)(?: (\S+))?\r?$", re.MULTILINE)
_QUOTED = 1000
CHECKED = ("vdb", "vdc", "vdd", "vde", "vdf")


@dataclass
class FioGuest:
    """The running guest; ``folder`` has its disks.  Made by ``running``."""

    vm: subprocess.Popen[bytes]
    folder: Path
    server: subprocess.Popen[bytes]
    counts: Counter[str] = field(default_factory=Counter)
    _heard: int = 0

    def listen(self) -> None:
        """Count what the guest has said since; TrialError if a disk was wrong, or it has ended."""
        new = b""
        with (
            contextlib.suppress(FileNotFoundError),  # the VM has not made it yet
            (self.folder / "console").open("rb") as console,
        ):
            console.seek(self._heard)
            new = console.read()
        new = new[: new.rfind(b"\n") + 1]
        self._heard += len(new)
        text = new.decode(errors="replace")
        for word, disk in _WORD.findall(text):
            self.counts[f"{word} {disk}".strip()] += 1
            if word == "broken":
                raise TrialError(f"{disk} is wrong: {text[:_QUOTED]!r}")
        if self.vm.poll() is not None and not self.counts["finished"]:
            assert self.vm.stderr is not None
            raise TrialError(f"ended with {self.vm.returncode}: {self.vm.stderr.read()!r}")

    def usage(self) -> Usage:
        """Return what the VM's process takes now."""
        return Usage.of(self.vm.pid, ram_kib=RAM_MIB << 10)

    def ask_status(self) -> None:
        """Ask over the control socket how the machine is; TrialError."""
        self._ask("status", {})

    def _ask(self, method: str, params: dict[str, object]) -> None:
        """Ask over the control socket, as a client that comes and goes; TrialError."""
        request = json.dumps({"id": 1, "method": method, "params": params})
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(patient(END_S))
            client.connect(str(self.folder / "control"))
            with client.makefile("rwb") as lines:
                lines.readline()  # its greeting
                lines.write(f"{request}\n".encode())
                lines.flush()
                answer = json.loads(lines.readline())
        if "result" not in answer:
            raise TrialError(f"{method}: {answer}")

    def wait_until_works(self) -> None:
        """Wait until fio has passed on each of the disks."""
        names = [*(f"passed {name}" for name in CHECKED), "passed vdg", "failed vdf"]
        self._wait(lambda: all(self.counts[name] for name in names), BOOT_S)

    def finish(self) -> str:
        """Tell it to finish; wait until it has, with a clean file system; return pyvmm's lines."""
        self._ask("console.write", {"data": base64.b64encode(b"stop\n").decode()})
        self._wait(lambda: bool(self.counts["finished"]), FINISH_S)
        _, said = self.vm.communicate(timeout=patient(END_S))
        if self.vm.returncode or not self.counts["clean vdc"]:
            raise TrialError(f"status {self.vm.returncode}, {dict(self.counts)}, {said!r}")
        return said.decode()

    def _wait(self, is_so: Callable[[], bool], seconds: float) -> None:
        until_s = time.monotonic() + patient(seconds)
        self.listen()
        while not is_so():
            if time.monotonic() > until_s:
                raise TrialError(f"not in {seconds:g} s and more: {dict(self.counts)}")
            time.sleep(1)
            self.listen()


@contextlib.contextmanager
def running(folder: Path, seconds: int) -> Iterator[FioGuest]:
    """A guest that works until it is told to finish; it will not be needed for more than
    ``seconds`` once it works."""
    images = [new_disk(folder / f"vd{letter}.img", DISK_MIB * MIB // 512) for letter in "bcdefg"]
    plain, under, written_through, elsewhere, failing, remote = images
    (folder / "faults").write_text(FAULTS)
    script = folder / "script"
    text = SCRIPT
    for name, value in (("FILL", RAM_MIB * 3 // 5), ("BAD", BAD_BLOCK)):
        text = text.replace(f"@{name}@", str(value))
    script.write_bytes(text.encode().ljust(8192, b"\n"))
    with (
        qemu_nbd(folder / "nbd", remote, stderr=subprocess.DEVNULL) as server,
        Export(elsewhere, folder / "export") as export,
    ):
        disks = (
            f"{plain},queues=4", f"{under},overlay={folder / 'overlay'}",
            f"{written_through},writeback=off,iops=200:400", f"vhost-user={folder / 'export'}",
            f"{failing},faults={folder / 'faults'}", f"nbd+unix:///disk?socket={folder / 'nbd'}",
            f"{script},ro",
        )
        options = [word for disk in disks for word in ("--disk", disk)]
        vm = subprocess.Popen(
            pyvmm("run", "--kernel", KERNEL, *ROOT_DISK, *options, "--cpus", str(CPUS),
                  "--memory", f"{RAM_MIB}M", "--console", folder / "console",
                  "--control", folder / "control",
                  "--timeout", f"{patient(2 * (BOOT_S + FINISH_S)) + 2 * seconds:g}",
                  "--append", f"quiet console=hvc0 {run_in_guest('sh /dev/vdh')}"),
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            start_new_session=True,
        )
        try:
            with killed_at_last(vm):
                yield FioGuest(vm, folder, server)
        finally:
            export.kill()
