"""fio on two disks of a Linux guest, for ever: each pass writes and checks every byte of it.

One works on /dev/vdb itself, one on a file in an ext4 on /dev/vdc.  Beside each lie bytes that
nobody writes again, with their sums.
"""

from __future__ import annotations

import time

from tests.support.guest import FIO
from tests.support.linux_machine import LinuxMachine
from tests.support.patience import patient

PLACES = {"vdb": "/dev/vdb", "vdc": "/mnt/fs/load"}
_KEPT = "dd if=/dev/vdb bs=64k skip=128 count=8 2>/dev/null | md5sum"
_PREPARE = (
    "mkdir /mnt/fs; {in_root}/sbin/mke2fs -q -t ext4 /dev/vdc; mount -t ext4 /dev/vdc /mnt/fs;"
    " dd if=/dev/urandom of=/mnt/fs/kept bs=64k count=8 2>/dev/null;"
    " dd if=/mnt/fs/kept of=/dev/vdb bs=64k seek=128 2>/dev/null; sync;"
    " md5sum </mnt/fs/kept >/mnt/sum; touch /mnt/vdb /mnt/vdc"
)
# A pass that ends well is a line; so is the last one, told to stop, and one with a wrong byte.
_SCRIPT = """\
{fio} >/mnt/$1.said 2>&1 && grep -q ';t;0;0;' /mnt/$1.said || {{ echo broken >>/mnt/$1; exit; }}
echo passed >>/mnt/$1
[ ! -e /mnt/stop ] || {{ echo stopped >>/mnt/$1; exit; }}
exec sh /mnt/load $1 $2
"""
# Few bytes to type for what is asked again and again: in the lab each takes its time.
_ASK = "p() { grep -c passed /mnt/vdb /mnt/vdc; cat /mnt/vd[bc] | grep -e broken -e stopped; }"
_POLL_S = 2.0
_FINISH = (
    "umount /mnt/fs && {in_root}/sbin/e2fsck -fn /dev/vdc >/mnt/fsck 2>&1; echo fsck $?;"
    " echo 3 >/proc/sys/vm/drop_caches; mount -o ro /dev/vdc /mnt/fs; cat /mnt/sum;"
    f" md5sum </mnt/fs/kept; {_KEPT}"
)


class FioLoad:
    """The load in a guest that is at its shell, where /mnt is empty; ``root`` has the tools."""

    def __init__(self, linux: LinuxMachine, root: str = "") -> None:
        self._in_root = f"chroot {root} " if root else ""
        assert linux.run("mount -t tmpfs none /mnt; dmesg -n 1") == ""
        for name in ("dev", "proc", "sys", "mnt") if root else ():
            assert linux.run(f"mount --bind /{name} {root}/{name}") == ""
        fio = self._in_root + FIO.format(file="$2", size="2m")
        linux.type(f"cat >/mnt/load <<'X'\n{_SCRIPT.format(fio=fio)}X\n")
        said = linux.run(_PREPARE.format(in_root=self._in_root))
        assert said == "", said
        assert linux.run(_ASK) == ""
        for disk, place in PLACES.items():
            # Not a job of the shell, which bash would tell of when it ends.
            linux.run(f"( (exec </dev/null; sh /mnt/load {disk} {place}) & )")

    def _look(self, linux: LinuxMachine) -> tuple[list[int], int]:
        """How often fio found each disk right, and how many it has left; AssertionError if one was
        wrong."""
        said = linux.run("p").splitlines()
        counts = [line.partition(":") for line in said[:2]]
        assert [name for name, _, _ in counts] == ["/mnt/vdb", "/mnt/vdc"], said
        assert set(said[2:]) <= {"stopped"}, linux.run("cat /mnt/*.said") + linux.complaints()
        return [int(count) for _, _, count in counts], len(said) - 2

    def passes(self, linux: LinuxMachine) -> list[int]:
        """How often fio has found each disk right in ``linux``; AssertionError if it once did not.
        """
        return self._look(linux)[0]

    def wait_for_passes(self, linux: LinuxMachine, more: int) -> None:
        """Wait until fio has found each disk right ``more`` times more."""
        before, until_s = self.passes(linux), time.monotonic() + patient(300)
        while True:
            now = self.passes(linux)
            if all(one >= then + more for one, then in zip(now, before, strict=True)):
                return
            assert time.monotonic() < until_s, (before, now)
            time.sleep(_POLL_S)

    def finish(self, linux: LinuxMachine) -> None:
        """End it behind the next pass, and check file system and sums: the run is good."""
        linux.run("touch /mnt/stop")
        until_s = time.monotonic() + patient(300)
        while self._look(linux)[1] < len(PLACES):
            assert time.monotonic() < until_s, linux.run("tail -n 3 /mnt/vd[bc]")
            time.sleep(_POLL_S)
        fsck, *sums = linux.run(_FINISH.format(in_root=self._in_root)).splitlines()
        assert fsck == "fsck 0", linux.run("cat /mnt/fsck")
        assert len(sums) == 3
        assert len(set(sums)) == 1, sums
