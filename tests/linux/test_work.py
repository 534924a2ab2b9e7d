"""Work on data that nobody vouches for is bounded: steps are counted here, never seconds."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyvmm.cli import explain
from pyvmm.config import RunConfig
from pyvmm.linux import compression, config, lz4, modules, work
from pyvmm.linux.compression import UnpackError, decompress
from pyvmm.linux.scan import MAX_PACKED_BYTES, MAX_SLOW_BYTES, scan, unpack_and_scan
from pyvmm.linux.work import LOOK_STEPS, MAX_STEPS, Budget, WorkError
from pyvmm.run.outcome import Kind, Outcome
from pyvmm.run.verdict import Evidence
from pyvmm.x86.inspect import inspect
from tests.support.kernels import ElfSegment, bz_with, elf
from tests.support.slow_data import SLOW, gzip_nothing, lz4_nothing, zstd_nothing

SIZE = (512 << 20).to_bytes(4, "little")


class Clock:
    """Time that passes by being looked at."""

    def __init__(self, step_s: float) -> None:
        self.looks = 0
        self._step_s = step_s

    def __call__(self) -> float:
        self.looks += 1
        return self.looks * self._step_s


@pytest.fixture(autouse=True)
def reference_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """This machine is as fast as the limits' own."""
    monkeypatch.setattr(Budget, "slowness", lambda budget: 1.0)


@pytest.mark.parametrize("name", SLOW)
def test_fault_4_the_worst_of_each_format_is_refused_within_the_steps(name: str) -> None:
    steps = 20 * LOOK_STEPS
    data = SLOW[name](4 << 20)
    for cost in (1, 3):
        clock = Clock(0.0)
        budget = Budget(steps=cost * steps, cpu_clock=clock)
        with pytest.raises(UnpackError, match=f"takes more than the limit of {cost * steps} steps"):
            decompress(data, limit=512 << 20, budget=budget)
        # A step too many is the last: nothing is read on after it.
        assert -(2 << 20) // 4096 - LOOK_STEPS - 1100 <= budget.steps_left < 0
        assert clock.looks <= cost * 20 + 2


@pytest.mark.parametrize("name", SLOW)
def test_fault_4_the_worst_of_each_format_is_refused_when_it_has_taken_too_long(name: str) -> None:
    """As if 64 KiB of it took 200 ms: of a machine's real speed no test says anything."""
    data = SLOW[name](4 << 20)
    clock = Clock(0.2)
    with pytest.raises(UnpackError, match="takes more than the limit of 5 s of CPU time"):
        decompress(data, limit=512 << 20, budget=Budget(cpu_clock=clock))
    assert clock.looks <= 5.0 / 0.2 + 2
    clock = Clock(0.2)
    budget = Budget(wall_s=1.0, wall_clock=clock, cpu_clock=Clock(0.0))
    with pytest.raises(UnpackError, match="takes more than the limit of 1 s"):
        decompress(data, limit=512 << 20, budget=budget)
    assert clock.looks <= 1.0 / 0.2 + 2


def test_fault_4_blocks_that_yield_nothing_in_a_whole_payload(tmp_path: Path) -> None:
    """31 MiB of them once took 22 s of CPU time, and the answer was that it holds no ELF image."""
    path = tmp_path / "bzImage"
    path.write_bytes(bz_with(lz4_nothing(31 << 20) + SIZE, init_size=64 << 20))
    assert inspect(path).unknown.startswith("LZ4 data takes more than the limit of")


def test_fault_4_as_many_small_blocks_as_the_budget_has(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = itertools.count()
    real = lz4.decompress_block

    def counted(data: bytes, budget: Budget) -> bytearray:
        next(calls)
        return real(data, budget)

    monkeypatch.setattr(lz4, "decompress_block", counted)
    with pytest.raises(UnpackError, match="steps of work"):
        decompress(lz4_nothing(1 << 20), limit=1, budget=Budget(steps=1000))
    assert next(calls) <= 1000


def test_fault_4_what_is_large_and_honest_is_within_the_budget() -> None:
    """An LZ4 kernel has a sequence for each six bytes; all else costs little beside its time."""
    assert MAX_SLOW_BYTES / 6 < MAX_STEPS
    feeds, kernel_pages = MAX_PACKED_BYTES >> 16, (512 << 20) >> 12
    assert (feeds + (512 << 20 >> 20)) * LOOK_STEPS + 2 * kernel_pages < MAX_STEPS


def test_fault_4_a_configuration_inside_a_kernel_is_spent_from_the_same_budget() -> None:
    inside = b"IKCFG_ST" + gzip_nothing(4 << 20) + b"IKCFG_ED"
    image = bytes(elf(ElfSegment(data=inside)))
    clock = Clock(0.5)
    found = scan([image], budget=Budget(cpu_clock=clock))
    assert found.config is None
    assert clock.looks <= 5.0 / 0.5 + 2
    assert config.unpack(gzip_nothing(1 << 20), "here", Budget(steps=LOOK_STEPS)) is None


def test_fault_4_looking_through_is_counted_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def endless() -> Iterator[bytes]:
        while True:
            yield b"Linux version "  # a banner that never comes

    with pytest.raises(WorkError, match="limit of 5000 steps"):
        scan(endless(), budget=Budget(steps=5000))
    path = tmp_path / "vmlinux"
    path.write_bytes(elf(ElfSegment(data=b"IKCFG_ST" * 500_000, p_memsz=8 << 20)))
    assert inspect(path).unknown == ""
    monkeypatch.setattr("pyvmm.x86.inspect.Budget", lambda: Budget(steps=100))
    assert inspect(path).unknown == (
        "to look through it takes more than the limit of 100 steps of work"
    )


def test_fault_4_a_configuration_beside_the_kernel(tmp_path: Path) -> None:
    path = tmp_path / "config"
    path.write_bytes(gzip_nothing(1 << 20))
    with pytest.raises(UnpackError, match="takes more than"):
        config.read(path, Budget(steps=LOOK_STEPS))
    path.rename(tmp_path / "config-x")
    assert config.beside(tmp_path / "vmlinuz-x", "", Budget(steps=LOOK_STEPS)) is None


@pytest.mark.parametrize(("script", "limit"), [
    ("while :; do :; done", r"takes more than the limit of 1 s of CPU time"),
    ("sleep 600", r"takes more than the limit of 2 s"),
])
def test_fault_4_a_program_is_not_waited_for_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, limit: str
) -> None:
    program = tmp_path / "zstd"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(compression, "_zstd_module", lambda: None)
    wall = Clock(1.0 if "sleep" in script else 0.0)
    budget = Budget(cpu_s=1.0, cpu_clock=Clock(0.0), wall_s=2.0, wall_clock=wall)
    with pytest.raises(UnpackError, match=limit):
        decompress(zstd_nothing(3000), limit=1 << 20, budget=budget)


def test_fault_4_modules_that_need_each_other_in_a_long_chain(tmp_path: Path) -> None:
    folder = tmp_path / "lib/modules/6.1/kernel"
    folder.mkdir(parents=True)
    count = 3000  # deeper than Python's own stack
    for number in range(count):
        needs = f"m{number + 1},m{number // 2}" if number + 1 < count else "m0,\u00fc"
        data = b"\0depends=" + needs.encode() + b"\0"
        (folder / f"m{number}.ko").write_bytes(data)
    loaded = [name for name, _ in modules.load_order(tmp_path, ["m0", "m-5", "none"])]
    assert sorted(loaded) == sorted({f"m{number}" for number in range(count)})
    assert len(set(loaded)) == len(loaded)
    assert loaded[0] == f"m{count - 1}"


def test_fault_4_an_explanation_ends_when_its_time_is_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``--timeout 2`` once came back after two minutes: the kernel was still being unpacked."""
    monkeypatch.setenv("PYVMM_CACHE", str(tmp_path / "cache"))
    kernel = tmp_path / "bzImage"
    kernel.write_bytes(bz_with(lz4_nothing(8 << 20) + SIZE, init_size=64 << 20))
    calls = itertools.count()
    real = lz4.decompress_block

    def counted(data: bytes, budget: Budget) -> bytearray:
        next(calls)
        return real(data, budget)

    monkeypatch.setattr(lz4, "decompress_block", counted)
    monkeypatch.setattr(work, "EXPLAIN_S", 0.0)
    lines = explain.after(RunConfig(kernel=kernel), Outcome(Kind.TIMEOUT), Evidence())
    assert lines
    assert 0 < next(calls) <= 2 * LOOK_STEPS


def test_a_payload_is_read_whole_where_there_is_budget() -> None:
    data = bytes(elf(ElfSegment(data=bytes(1 << 20))))
    block = b"\xf0" + bytes([255] * ((len(data) - 15) // 255)) + bytes([(len(data) - 15) % 255])
    packed = b"\x02\x21\x4c\x18" + len(block + data).to_bytes(4, "little") + block + data
    budget = Budget(steps=10_000)
    found = unpack_and_scan(packed + len(data).to_bytes(4, "little"), budget=budget)
    assert found.is_elf
    assert budget.steps_left > 0


def test_a_slower_machine_has_more_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Budget, "slowness", lambda budget: 30.0)
    clock = Clock(1.0)
    budget = Budget(cpu_clock=clock)
    with contextlib.suppress(WorkError):
        for _ in range(1000):
            budget.look()
    assert 150 <= clock.looks <= 152


def test_slowness_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert 1.0 <= Budget().slowness() < 1000.0
