"""User-space exits a request takes: KVM's tracepoint, checked against pyvmm's own counters."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping

from bench.figures import BenchError, Figure, Limit
from bench.host import Host
from bench.kvm_trace import UserspaceExits, difference
from bench.linux_guest import SHOW_FIO, boot, fio, fio_jobs, mark, say
from bench.peers import Contender
from bench.suite import Reading, Suite

REQUEST_KIB = 4
REQUESTS = 2048
JOB = "--rw=randread --bs=4k --iodepth=1"
TOLERANCE = 0.01
"""By how much of all exits pyvmm's own count may differ from KVM's."""
_OWN_COUNT = re.compile(r"^pyvmm: exits: (.*)$", re.MULTILINE)


def suite(option: str, how: str, limit: str) -> Suite:
    """Exits with the ``option`` of pyvmm that has requests served ``how``; peers as they are."""
    figure = Figure(
        key=f"exits.{option}", name=f"user-space exits per 4 KiB request, served {how}",
        unit="exits", ours=Limit(limit),
    )

    def sample(host: Host, contender: Contender, wanted: Collection[str]) -> Mapping[str, Reading]:
        return {figure.key: _sample(host, contender, option)}

    return Suite(figures=(figure,), sample=sample, max_samples=2, warm_up=False)


def _sample(host: Host, contender: Contender, option: str) -> Reading:
    """Exits between two marks on the console; the guest is idle when each is read.

    fio has been started once before, so that nothing has to be read from the root disk.
    """
    job = fio([JOB], f"--io_size={REQUESTS * REQUEST_KIB}k")
    script = (
        f"fio --version; sleep 1; {say('begin')}; sleep 1; {job}; sleep 1; {say('end')}; sleep 1;"
        f" {SHOW_FIO}"
    )
    extra = ["data", option] if contender.ours else ["data"]
    with UserspaceExits() as exits, boot(contender, *extra, script=script, data=host.disk()) as vmm:
        vmm.wait_for(mark("begin"))
        exits.settle()
        before = exits.read()
        vmm.wait_for(mark("end"))
        between = difference(exits.read(), before)
        requests = fio_jobs(vmm.finish(), 1)[0].kib / REQUEST_KIB
        note = _compare(vmm.errors(), exits.read()) if contender.ours else ""
    if requests != REQUESTS:
        raise BenchError(f"fio made {requests} requests, not {REQUESTS}")
    return Reading(sum(between.values()) / requests, note)


def _compare(messages: str, counted: Counter[str]) -> str:
    """What to say of pyvmm's own count; BenchError if it is not KVM's."""
    found = _OWN_COUNT.search(messages)
    if found is None:
        return "gives no count of its own, so KVM's is not checked"
    own, kvm = own_total(found[1]), sum(counted.values())
    if abs(own - kvm) > TOLERANCE * kvm:
        raise BenchError(f"pyvmm counted {own} exits, KVM {kvm}: {dict(counted)}")
    return ""


def own_total(text: str) -> int:
    """The sum of ``NAME NUMBER, NAME NUMBER``, as `pyvmm run -v` counts its exits."""
    return sum(int(number) for number in re.findall(r"\b(\d+)\b", text))
