"""What programs under measurement say, and short samples of real ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import peers
from bench.figures import BenchError
from bench.host import Host
from bench.kvm_trace import difference, parse_histogram
from bench.linux_guest import FioJob, boot, fio_jobs
from bench.peers import Contender
from bench.rows import bare, device, exits, ram
from bench.rows import boot as boot_row

QSD = (
    "qemu-storage-daemon --blockdev driver=file,node-name=d,filename={disk} --export"
    " type=vhost-user-blk,id=e,node-name=d,writable=on,addr.type=unix,addr.path={socket}"
)


def terse(*, error: int = 0, read: str = "0;0;0;0", write: str = "0;0;0;0") -> str:
    """A line of fio: 5 fields, 41 of reading, 41 of writing, and more."""
    rest = ";".join(["0"] * 37)
    return f"3;fio-3.33;j0;0;{error};{read};{rest};{write};{rest};1.0%;2.0%;3;0;4"


def test_fio_reads_and_writes_are_found() -> None:
    text = f"noise\n{terse(read='8192;4096;1024;2000')}\n{terse(write='40;20;5;2000')}\nend\n"
    first, second = fio_jobs(text, 2)
    assert (first.kib, first.kib_per_second, first.per_second) == (8192, 4096, 1024)
    assert (second.kib, second.kib_per_second, second.per_second) == (40, 20, 5)


def test_fio_that_failed_is_an_error() -> None:
    with pytest.raises(BenchError, match="error 5"):
        FioJob(terse(error=5))
    with pytest.raises(BenchError, match="fio said: 3;fio"):
        FioJob("3;fio-3.33;cut off")
    with pytest.raises(BenchError, match=r"1 of 2 fio results; the console ends: .*panic"):
        fio_jobs(f"{terse()}\nKernel panic", 2)


def test_a_script_has_to_fit_a_command_line() -> None:
    with pytest.raises(ValueError, match="double quotes"):
        boot(Contender(name="n"), script='echo "x"')
    with pytest.raises(ValueError, match="too many"):
        boot(Contender(name="n"), script="x" * 2000)


def test_a_histogram_of_exits_is_read_by_reason() -> None:
    text = (
        "# event histogram\n#\n\n"
        "{ reason:         10, errno: 18446744073709551612 } hitcount:          3\n"
        "{ reason:          2, errno:          0 } hitcount:         26\n"
        "{ reason:          6, errno:          0 } hitcount:       4100\n"
        "{ reason:          6, errno: 18446744073709551612 } hitcount:          1\n"
        "{ reason:         24, errno:          0 } hitcount:          1\n\n"
        "Totals:\n    Hits: 4131\n"
    )
    counts = parse_histogram(text)
    assert counts == {"mmio": 4100, "io": 26, "interrupted": 4, "reason 24": 1}
    assert difference(counts, parse_histogram(""))["mmio"] == 4100
    assert sum(difference(counts, counts).values()) == 0


def test_our_own_count_of_exits_is_the_sum_of_its_parts() -> None:
    assert exits.own_total("mmio 4100, io 26, interrupted 4") == 4130


SMAPS = """\
7f0000000000-7f0010000000 rw-p 00000000 00:00 0
Size:             262144 kB
KernelPageSize:        4 kB
Rss:               40000 kB
Pss:               40000 kB
7f0020000000-7f0020100000 r-xp 00000000 fe:00 12 /usr/lib/libc.so.6
Size:               1024 kB
Rss:                 800 kB
Pss:                  10 kB
ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0 [vsyscall]
Size:                  4 kB
Rss:                   8 kB
"""


def test_resident_memory_is_counted_without_guest_ram() -> None:
    assert boot_row.rss_beyond_kib(SMAPS, 256 << 10) == 808
    assert boot_row.rss_beyond_kib("", 256 << 10) == 0, "a kernel thread, or a zombie"
    with pytest.raises(BenchError, match="512 MiB"):
        boot_row.rss_beyond_kib(SMAPS, 512 << 10)


def test_the_ring_driver_measures_a_storage_daemon(tmp_path: Path) -> None:
    daemon = Contender(name="qsd", lines={"command": QSD})
    wanted = ["device.read.d32", "device.write.d1"]
    readings = device.sample(Host(tmp_path, 0.1), daemon, wanted)
    assert sorted(readings) == sorted(wanted)
    assert all(one.value > 0 and not one.note for one in readings.values())


def test_a_daemon_that_fails_says_why(tmp_path: Path) -> None:
    daemon = Contender(name="qsd", lines={"command": "qemu-storage-daemon --no-such-option"})
    with pytest.raises(BenchError, match=r"ended before it made its socket: .*no-such-option"):
        device.sample(Host(tmp_path, 0.1), daemon, ["device.read.d1"])


@pytest.mark.bare
def test_bare_guests_start_and_exit(tmp_path: Path) -> None:
    ours = peers.load()["vmm"][0]
    host = Host(tmp_path, 0.1)
    assert bare.START.key in bare.sample_start(host, ours, [bare.START.key])
    for contender in (ours, bare.IN_C):
        assert bare.EXITS.key in bare.sample_exits(host, contender, [bare.EXITS.key])


def test_ram_is_measured_in_both_ways(tmp_path: Path) -> None:
    wanted = [figure.key for figure in ram.suite(Contender(name="we")).figures]
    ours, plain = (
        ram.sample(Host(tmp_path, 0.1), contender, wanted)
        for contender in (Contender(name="we", ours=True), ram.PLAIN)
    )
    assert sorted(ours) == sorted(plain) == sorted(wanted)
    for key in ("ram.live", "ram.checkpoint"):
        assert ours[key].value < plain[key].value
