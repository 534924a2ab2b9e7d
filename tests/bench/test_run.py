"""What is measured, in which order; a short run from end to end."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import pytest

from bench import peers, run
from bench.figures import BenchError, Figure, Limit, Sample
from bench.host import Host
from bench.peers import Contender
from bench.run import Plan, measure
from bench.suite import Reading, Suite

MORE = Figure(key="a.more", name="more of it", unit="1/s", ratio=Limit(">= 1.5"))
LESS = Figure(key="a.less", name="less of it", unit="MiB", ratio=Limit("<= 0.5"))
QSD = (
    "qemu-storage-daemon --blockdev driver=file,node-name=d,filename={disk} --export"
    " type=vhost-user-blk,id=e,node-name=d,writable=on,addr.type=unix,addr.path={socket}"
)


class Recorder:
    """A suite of two figures, whose samples say who was asked when."""

    def __init__(self, failing: str = "") -> None:
        self.asked: list[str] = []
        self._failing = failing

    def sample(
        self, host: Host, contender: Contender, wanted: Collection[str]
    ) -> Mapping[str, Reading]:
        self.asked.append(contender.name)
        if contender.name == self._failing:
            raise BenchError("it broke")
        return {key: Reading(len(self.asked)) for key in wanted}

    def suite(self, *, repeats: int = 1, max_samples: int = 1000, warm_up: bool = True) -> Suite:
        return Suite(
            figures=(MORE, LESS), sample=self.sample, repeats=repeats, max_samples=max_samples,
            contenders=(Contender(name="we", ours=True), Contender(name="they")), warm_up=warm_up,
        )


@pytest.fixture
def take(tmp_path: Path) -> Callable[..., list[Sample]]:
    """Measure one suite; the samples."""

    def measured(suite: Suite, *, runs: int, quick: bool = False) -> list[Sample]:
        plan, taken = Plan(peers.load()), list[Sample]()
        measure(plan, [suite], Host(tmp_path, 0.1), taken.append, runs=runs, quick=quick)
        return taken

    return measured


def test_contenders_are_asked_in_turn_and_the_first_time_does_not_count(
    take: Callable[..., list[Sample]],
) -> None:
    recorder = Recorder()
    taken = take(recorder.suite(), runs=2)
    assert recorder.asked == ["we", "they"] * 3
    assert [one.warm_up for one in taken] == [True] * 4 + [False] * 8
    assert {one.figure for one in taken} == {"a.more", "a.less"}


def test_who_fails_is_not_asked_again(take: Callable[..., list[Sample]]) -> None:
    recorder = Recorder("we")
    taken = take(recorder.suite(), runs=2)
    assert recorder.asked == ["we", "they", "they", "they"]
    assert [one.error for one in taken if one.contender == "we"] == ["it broke"] * 2


def test_short_samples_are_repeated_and_counts_are_not(take: Callable[..., list[Sample]]) -> None:
    recorder = Recorder()
    take(recorder.suite(repeats=4), runs=2)
    assert len(recorder.asked) == 2 * (1 + 8)
    recorder = Recorder()
    take(recorder.suite(max_samples=2, warm_up=False), runs=9)
    assert len(recorder.asked) == 2 * 2


def test_a_quick_run_takes_one_sample_each(take: Callable[..., list[Sample]]) -> None:
    recorder = Recorder()
    taken = take(recorder.suite(repeats=4), runs=5, quick=True)
    assert recorder.asked == ["we", "they"]
    assert not any(one.warm_up for one in taken)


def test_every_figure_of_the_issue_is_planned_with_its_target() -> None:
    rows = {row.key: row.target for row in Plan(peers.load()).results([])}
    assert {key: target for key, target in rows.items() if target} == {
        "exits.io_thread": "ours <= 0.05",
        "exits.at_exit": "ours <= 1.05",
        "guest.read.d1": "ratio >= 1.2",
        "guest.read.d32": "ratio >= 1.5",
        "guest.read.1m": "ratio >= 1.2",
        "guest.write.fsync": "ratio >= 1.2",
        "guest.vhost_user.d32": "ratio >= 1.0",
        "device.read.d32": "ratio >= 2.0",
        "device.write.d32": "ratio >= 2.0",
        "device.read.d1": "ratio >= 1.0",
        "device.write.d1": "ratio >= 1.0",
        "start.instruction": "ratio <= 0.8",
        "start.user_space": "ratio <= 0.9",
        "memory": "ratio <= 0.5 and ours <= 25",
        "bare.exits": "ratio >= 0.95",
        "ram.live": "ours <= 10",
        "snapshot.restore": "ratio <= 0.8",
        "snapshot.rewind": "ours <= 2",
        "snapshot.clone": "ours <= 8",
        "snapshot.shell": "ours <= 3",
        "snapshot.pause": "ours <= 10",
    }


def test_only_takes_figures_and_groups() -> None:
    plan = Plan(peers.load(), ["guest.read", "memory"])
    assert [row.key for row in plan.results([])] == [
        "guest.read.d1", "guest.read.d32", "guest.read.1m", "memory"
    ]
    assert plan.suites(boots_linux=False) == []
    with pytest.raises(BenchError, match=r"--only gues: the figures are exits\.io_thread, "):
        Plan(peers.load(), ["gues"])


@pytest.mark.parametrize("options", [["--runs", "0"], ["--only", "x"], ["--peers", "/nowhere"]])
def test_bad_options_are_told(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run.main(options)
    assert ended.value.code == 2
    assert "error: " in capsys.readouterr().err


def test_a_quick_run_ends_with_a_table_and_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "peers.toml"
    file.write_text(
        '[[vmm]]\nname = "v"\nours = true\ncommand = "v"\n'
        f'[[daemon]]\nname = "ours"\nours = true\ncommand = "{QSD}"\n'
        f'[[daemon]]\nname = "theirs"\ncommand = "{QSD}"\n'
        '[[daemon]]\nname = "absent"\ncommand = "no-such-daemon"\n'
    )
    options = ["--quick", "--only", "device.read.d1", "--peers", str(file)]
    assert run.main([*options, "--out", str(tmp_path / "out")]) == 1, "one peer is not there"
    rows = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [(row["key"], row["peer"]) for row in rows] == [
        ("device.read.d1", "theirs"), ("device.read.d1", "absent")
    ]
    assert rows[0]["ratio"] == rows[0]["ours"] / rows[0]["theirs"]
    assert rows[1]["theirs"] is None
    assert rows[1]["error"] == "absent: no-such-daemon is not installed"
    assert "device alone, 4 KiB random read, depth 1" in capsys.readouterr().out
