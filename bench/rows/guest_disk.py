"""A Linux guest's disk, by fio in the guest: served by the VMM, and through vhost-user."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from bench.figures import Figure, Limit
from bench.host import Host
from bench.linux_guest import SHOW_FIO, FioJob, boot, fio, fio_for, fio_jobs, mark, say
from bench.peers import Contender
from bench.process import serving
from bench.suite import Reading, Suite

RANDOM_READ = "--rw=randread --bs=4k"
FIGURES = (
    Figure(key="guest.read.d1", name="4 KiB random read in a guest, depth 1", unit="requests/s",
           ratio=Limit(">= 1.2")),
    Figure(key="guest.read.d32", name="4 KiB random read in a guest, depth 32",
           unit="requests/s", ratio=Limit(">= 1.5")),
    Figure(key="guest.read.1m", name="1 MiB sequential read in a guest", unit="MiB/s",
           ratio=Limit(">= 1.2")),
    Figure(key="guest.write.fsync", name="4 KiB random write + fsync in a guest",
           unit="requests/s", ratio=Limit(">= 1.2")),
)
JOBS = {
    "guest.read.d1": f"{RANDOM_READ} --iodepth=1",
    "guest.read.d32": f"{RANDOM_READ} --iodepth=32",
    "guest.read.1m": "--rw=read --bs=1m --iodepth=1",
    "guest.write.fsync": "--rw=randwrite --bs=4k --iodepth=1 --fsync=1",
}
VHOST_USER = Figure(
    key="guest.vhost_user.d32",
    name="4 KiB random read in a guest, depth 32, disk by qemu-storage-daemon",
    unit="requests/s", ratio=Limit(">= 1.0"),
)
DAEMON = "qemu-storage-daemon"


def sample(host: Host, contender: Contender, wanted: Collection[str]) -> Mapping[str, Reading]:
    """One boot; the jobs run one after another."""
    jobs = {key: job for key, job in JOBS.items() if key in wanted}
    script = f"{fio(list(jobs.values()), fio_for(host.seconds))}; {say('done')}; {SHOW_FIO}"
    with boot(contender, "data", script=script, data=host.disk()) as vmm:
        vmm.wait_for(mark("done"))
        results = fio_jobs(vmm.finish(), len(jobs))
    return {
        key: Reading(_value(key, result)) for key, result in zip(jobs, results, strict=True)
    }


def _value(key: str, result: FioJob) -> float:
    return result.kib_per_second / 1024 if key == "guest.read.1m" else result.per_second


SUITE = Suite(figures=FIGURES, sample=sample)


def vhost_user_suite(daemon: Contender) -> Suite:
    """Every VMM with its disk served by a fresh ``daemon``."""

    def sample_vhost_user(
        host: Host, contender: Contender, wanted: Collection[str]
    ) -> Mapping[str, Reading]:
        socket = host.scratch / "guest.sock"
        jobs = fio([JOBS["guest.read.d32"]], fio_for(host.seconds))
        script = f"{jobs}; {say('done')}; {SHOW_FIO}"
        with (
            serving(daemon.command("command", disk=host.disk(), socket=socket), socket),
            boot(contender, "vhost_user", script=script, socket=socket) as vmm,
        ):
            vmm.wait_for(mark("done"))
            result = fio_jobs(vmm.finish(), 1)[0]
        return {VHOST_USER.key: Reading(result.per_second)}

    return Suite(figures=(VHOST_USER,), sample=sample_vhost_user)
