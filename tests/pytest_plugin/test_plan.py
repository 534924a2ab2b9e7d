"""From a marker's arguments to a machine's configuration."""

from __future__ import annotations

from pathlib import Path

import pytest

import pyvmm
from pyvmm.pytest_plugin.marker import ArgumentsError, checked
from pyvmm.pytest_plugin.plan import Plan, make_plan


def plan(
    root: Path, of_session: str | None = None, *, is_lab: bool = False, **arguments: object
) -> Plan:
    return make_plan(
        checked("here", arguments), kernel=of_session, disks=[f"{root}/option.img"], root=root,
        is_lab=is_lab,
    )


def test_the_marker_wins_over_the_option(tmp_path: Path) -> None:
    assert plan(tmp_path, "/k").config.kernel == "/k"
    assert plan(tmp_path, "/k", kernel="own").config.kernel == str(tmp_path / "own")
    assert plan(tmp_path, "/k/2", kernel=["/k/1", "/k/2"]).config.kernel == "/k/2"
    assert plan(tmp_path, None, kernel=["/k/1"]).config.kernel == "/k/1"
    assert [repr(disk) for disk in plan(tmp_path, "/k").config.disks] == [
        f"Overlay(RawDisk('{tmp_path}/option.img'))"
    ]
    assert plan(tmp_path, "/k", disks=[]).config.disks == []


@pytest.mark.parametrize(("disk", "shown"), [
    ("a.img", "Overlay(RawDisk('ROOT/a.img'))"),
    ("a.img,snapshot", "Overlay(RawDisk('ROOT/a.img'))"),
    ("a.img,ro", "RawDisk('ROOT/a.img')"),
    ("/a,b.img,rw", "RawDisk('/a,b.img')"),
    ("/a,b.img", "Overlay(RawDisk('/a,b.img'))"),
    (Path("a.img"), "Overlay(RawDisk('ROOT/a.img'))"),
    ("nbd://localhost/x", "Overlay(NbdDisk('nbd://localhost/x'))"),
    ("nbd://localhost/x,rw", "NbdDisk('nbd://localhost/x')"),
    (pyvmm.RawDisk("b.img"), "RawDisk('b.img')"),
])
def test_a_path_is_a_snapshot_unless_told(tmp_path: Path, disk: object, shown: str) -> None:
    (found,) = plan(tmp_path, "/k", disk=disk).config.disks
    assert repr(found) == shown.replace("ROOT", str(tmp_path))
    assert getattr(found, "read_only", None) == str(disk).endswith(",ro")


def test_no_kernel_says_how_to_name_one(tmp_path: Path) -> None:
    with pytest.raises(ArgumentsError, match=r"--pyvmm-kernel K.*pyvmm kernel fetch debian"):
        plan(tmp_path)


def test_limits_are_longer_in_the_lab(tmp_path: Path) -> None:
    limit_s = 5
    here, lab = (plan(tmp_path, "/k", is_lab=is_lab, timeout=limit_s) for is_lab in (False, True))
    assert (here.config.timeout_s, lab.config.timeout_s) == (5, 50)
    assert (here.boot_timeout_s, lab.boot_timeout_s) == (60, 300)


@pytest.mark.parametrize(("agent", "way"), [
    (True, "inject"), (False, "none"), ("image", "image"), ("none", "none"),
])
def test_the_agent_is_put_into_the_guest_unless_told(
    tmp_path: Path, agent: object, way: str
) -> None:
    found = plan(tmp_path, "/k", agent=agent)
    assert found.config.run_config().agent == way
    assert found.has_agent == (way != "none")


def test_equal_plans_share_a_guest(tmp_path: Path) -> None:
    disk = pyvmm.RawDisk("x")
    assert plan(tmp_path, "/k", memory="1G").key == plan(tmp_path, "/k", memory="1G").key
    assert plan(tmp_path, "/k", memory="1G").key != plan(tmp_path, "/k", memory="2G").key
    assert plan(tmp_path, "/k", disk=disk).key == plan(tmp_path, "/k", disk=disk).key
    assert plan(tmp_path, "/k", disk=disk).key != plan(tmp_path, "/k", disk="x").key
    assert plan(tmp_path, "/k").key != plan(tmp_path, "/k", may_end=True).key
    loose = pyvmm.FAIL_ON.without("warning")
    assert plan(tmp_path, "/k").key != plan(tmp_path, "/k", fail_on=loose).key


def test_a_directory_stands_for_the_kernel_in_it(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    for name in ("vmlinuz-6.1", "initramfs-6.1.cpio.gz"):
        tree.mkdir(exist_ok=True)
        tree.joinpath(name).touch()
    found = plan(tmp_path, kernel="tree").config
    assert found.kernel == str(tree / "vmlinuz-6.1")
    assert found.initrd == str(tree / "initramfs-6.1.cpio.gz")
    assert plan(tmp_path, kernel="tree", initrd="mine").config.initrd == str(tmp_path / "mine")
