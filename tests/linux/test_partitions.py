"""Partition tables, as sfdisk writes them, and as nobody should."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvmm.linux.file_systems import HEAD_BYTES, detect
from pyvmm.linux.partitions import MAX_PARTITIONS, Partition, read_partitions, table_kind
from tests.support import disk_heads


def partitions_of(data: bytes) -> tuple[Partition, ...]:
    return read_partitions(lambda at: data[at : at + HEAD_BYTES])


def sfdisk(tmp_path: Path, script: str) -> tuple[bytes, dict[int, dict[str, str]]]:
    """A disk that sfdisk partitioned, and what it says of it by ``--dump``."""
    image = tmp_path / "image"
    image.write_bytes(bytes(64 << 20))
    subprocess.run(["/sbin/sfdisk", "-q", image], input=script, text=True, check=True)
    dump = subprocess.run(["/sbin/sfdisk", "--dump", image], capture_output=True, text=True,
                          check=True).stdout
    found = {}
    for line in dump.splitlines():
        if " : " in line and line.startswith(str(image)):
            name, _, rest = line.partition(" : ")
            fields = re.findall(r'([\w-]+)=\s*("[^"]*"|[^,\s]+)', rest)
            found[int(name.removeprefix(str(image)))] = {
                key: value.strip('"') for key, value in fields
            }
    return image.read_bytes(), found


GPT = """label: gpt
size=1MiB, type=21686148-6449-6E6F-744E-656564454649
start=8192, size=8MiB, type=U, name="EFI system"
5: start=40960, size=32MiB, type=4F68BCE3-E8CD-4DB1-96E7-FBCAF984B709, name="my root"
"""
DOS = """label: dos
label-id: 0x6c1b2c8d
size=4MiB, type=83, bootable
size=40MiB, type=5
size=8MiB, type=82
size=8MiB, type=83
size=8MiB, type=83
"""


@pytest.mark.parametrize(("script", "kind"), [(GPT, "gpt"), (DOS, "dos")])
def test_what_sfdisk_writes(tmp_path: Path, script: str, kind: str) -> None:
    data, wanted = sfdisk(tmp_path, script)
    assert table_kind(data) == kind
    found = {partition.number: partition for partition in partitions_of(data)}
    extended = {number for number, fields in wanted.items() if fields["type"] == "5"}
    assert found.keys() == wanted.keys() - extended
    for number, partition in found.items():
        fields = wanted[number]
        assert partition.offset == int(fields["start"]) * 512
        assert partition.length == int(fields["size"]) * 512
        if kind == "gpt":
            assert partition.kind == fields["type"].lower()
            assert partition.uuid == fields["uuid"].lower()
            assert partition.label == fields.get("name", "")
        else:
            assert int(partition.kind, 16) == int(fields["type"], 16)
            assert partition.uuid == f"6c1b2c8d-{number:02x}"
    assert len(found) == (3 if kind == "gpt" else 4)


@pytest.mark.parametrize(("make", "kind"), [
    (disk_heads.dos_disk, "dos"), (disk_heads.gpt_disk, "gpt"),
])
def test_one_partition(make: Callable[[int, int], bytes], kind: str) -> None:
    head = make(3, 2048)
    assert table_kind(head) == kind
    (partition,) = partitions_of(head)
    assert (partition.number, partition.offset) == (3, 2048 * 512)
    assert detect(head) is None


def test_a_boot_sector_is_no_partition_table() -> None:
    sector = bytearray(512)
    sector[446:510] = b"NTLDR is missing" * 4
    sector[510:] = b"\x55\xaa"
    assert table_kind(bytes(sector)) == ""
    assert table_kind(bytes(510) + b"\x55\xaa") == "", "nothing is in it"


@given(st.binary(max_size=2000), st.sampled_from(["gpt", "dos"]))
def test_no_bytes_are_too_bad_for_a_partition_table(data: bytes, kind: str) -> None:
    table = b"EFI PART" if kind == "gpt" else b""
    head = bytes(446) + data[:64].ljust(64, b"\0") + b"\x55\xaa" + table + data
    reads = 0

    def read(at: int) -> bytes:
        nonlocal reads
        reads += 1
        return head  # everywhere the same: tables that lead to themselves

    assert len(read_partitions(read)) <= 2 * MAX_PARTITIONS
    assert reads <= MAX_PARTITIONS + 2


def test_fuzz_a_chain_of_tables_without_partitions_has_an_end() -> None:
    def read(at: int) -> bytes:
        """Every sector is a table that names the next one, on a disk of any size."""
        reads.append(at)
        entry = bytes((0, 0, 0, 0, 5, 0, 0, 0))
        following = entry + (at // 512 + 1).to_bytes(4, "little") + bytes(4)
        return bytes(446) + following + bytes(48) + b"\x55\xaa"

    reads: list[int] = []
    assert read_partitions(read) == ()
    assert len(reads) == 1 + MAX_PARTITIONS
