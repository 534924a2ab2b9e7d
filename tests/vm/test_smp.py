"""Several vCPUs: no byte of theirs is lost or torn, none of them stalls under load."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from tests.support.guest import FIO, IMAGE, ROOT_DISK, boot, run_in_guest, sparse
from tests.support.patience import patient

pytestmark = pytest.mark.kvm

CPUS = 4
STRESS_S = int(os.environ.get("PYVMM_STRESS_S", "10"))
"""How long the load lasts; ``make soak`` gives it a minute."""
STALL_S = 1.0 if STRESS_S >= 60 else 10.0
"""The longest gap.  ``make soak`` wants a quiet host; the host of ``make test`` may have others to
serve, and in the lab four busy vCPUs share one emulated CPU: what is to be seen there is a vCPU
that never goes on.  Beside a second lab on two cores 4 s were seen, 0.4 s alone."""
# Twenty times a second, and with no new process: the time since the last time, in 1/100 s.  One on
# each vCPU, which the guest's scheduler runs before all else (SCHED_FIFO): among a dozen programs
# that want to run one of its own choice waits for a second and more, whatever the machine.
TICKER = (
    "mkfifo /dev/shm/never$1; exec 3<>/dev/shm/never$1; last=0; while :; do"
    " read up idle < /proc/uptime; now=${up%.*}${up#*.};"
    " [ $last -eq 0 ] || echo $((now - last)); last=$now; read -t 0.05 nothing <&3; done"
)


def test_a_thousand_numbered_lines_come_out_whole() -> None:
    script = "for n in 1 2 3 4; do (for i in $(seq 1 250); do echo line-$n-$i; done)& done; wait"
    run = boot("--disk", f"{IMAGE},snapshot", "--cpus", str(CPUS), append=run_in_guest(script))
    assert run.status == 0, run.console + run.messages
    lines = re.findall(r"^line-\d-\d+$", run.console, re.MULTILINE)
    assert sorted(lines) == sorted(
        f"line-{writer}-{number}" for writer in range(1, 5) for number in range(1, 251)
    )


def test_the_vcpus_share_the_work_and_have_apic_ids_of_their_own() -> None:
    script = (
        "for n in 0 1 2 3; do taskset $((1 << n)) sh -c 'echo ran; exit' ; done;"
        " grep -E 'apicid|siblings|cpu.cores' /proc/cpuinfo | grep -v initial;"
        " grep -c online /proc/interrupts; cat /sys/devices/system/cpu/online"
    )
    run = boot("--disk", f"{IMAGE},snapshot", "--cpus", str(CPUS), append=run_in_guest(script))
    assert run.lines("ran") == [""] * CPUS, run.console + run.messages
    assert [line.split()[-1] for line in run.lines("apicid")] == ["0", "1", "2", "3"]
    assert {line.split()[-1] for line in run.lines("siblings")} == {str(CPUS)}
    assert "0-3" in run.console.splitlines()


def test_no_interrupt_is_lost_and_nothing_stalls_under_load(tmp_path: Path) -> None:
    """Two disks written and read back, all vCPUs busy; a clock on each of them notes every gap."""
    load = f"cat > /dev/shm/tick <<'X'\n{TICKER}\nX\n" + "; ".join([
        "for n in 0 1 2 3; do"
        " chrt -f 2 taskset $((1 << n)) sh /dev/shm/tick $n > /dev/shm/gaps$n & done",
        "for n in 1 2 3 4; do (while :; do :; done) & done",
        f"end=$(($(cut -d. -f1 /proc/uptime) + {STRESS_S}))",
        "work() { while [ $(cut -d. -f1 /proc/uptime) -lt $end ]; do"
        f" {FIO.format(file='/dev/$1', size='4m')} > /dev/shm/$1 || echo broken $1;"
        " grep -q ';t;0;0;' /dev/shm/$1 && echo whole $1; done; }",
        "work vdb & a=$!; work vdc & wait $! $a",
        "for n in 0 1 2 3; do"
        " echo ticks $(wc -l < /dev/shm/gaps$n) longest $(sort -n /dev/shm/gaps$n | tail -1); done",
        "exit 0",
    ]).replace("&;", "&")
    disks = [sparse(tmp_path / name, 8) for name in ("b", "c")]
    script = tmp_path / "load"
    script.write_text(load.ljust(4096, "\n"))
    run = boot(
        *ROOT_DISK, "--disk", disks[0], "--disk", f"{disks[1]},queues=4", "--disk", f"{script},ro",
        "--cpus", str(CPUS), append=run_in_guest("sh /dev/vdd"),
        timeout_s=patient(60 + 10 * STRESS_S),
    )
    assert run.status == 0, run.console + run.messages
    assert not run.lines("broken"), run.console
    for name in ("vdb", "vdc"):
        assert run.lines(f"whole {name}"), run.console
    clocks = re.findall(r"^ticks (\d+) longest (\d+)$", run.console, re.MULTILINE)
    assert len(clocks) == CPUS, run.console
    for ticks, longest_cs in clocks:
        print(f"{ticks} ticks, the longest gap {int(longest_cs) / 100} s")
        assert int(ticks) > STRESS_S, run.console
        assert int(longest_cs) / 100 < STALL_S, run.console
