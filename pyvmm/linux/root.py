"""Find the place to which ``root=`` points on a run's disks, and why it may not be mounted.

A mistake is a line for a person before the boot, and refuses nothing.  Disks that cannot be read,
and contents that are not known here, are never judged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from pyvmm.linux import file_systems
from pyvmm.linux.partitions import (
    MAX_PARTITIONS,
    ROOT_KINDS,
    Partition,
    lost_gpt,
    read_partitions,
    table_kind,
)
from pyvmm.numerals import whole_number
from pyvmm.startup.types import Record

DISK = "/dev/vd"
PAGE_BYTES = 4096
_BY_LINKS = {"by-uuid": "UUID", "by-label": "LABEL", "by-partuuid": "PARTUUID",
             "by-partlabel": "PARTLABEL"}
_GUID_LENGTH = 36  # of a GPT partition; an MBR one's is SSSSSSSS-PP
_MAX_LISTED = 8
_LARGE_BLOCKS_SINCE = {"xfs": (6, 12), "ext2": (6, 19), "ext3": (6, 19), "ext4": (6, 19)}
"""The first Linux that mounts blocks larger than a page."""
_NEEDS_HELP = ("LUKS", "LVM", "RAID", "BitLocker")
_NO_ROOT = ("swap", "empty")
_BY_LETTER, _BY_NUMBER = ("vd", "xvd", "sd", "hd"), ("nvme", "mmcblk")
"""Linux's names of a virtual machine's disks, ours and those of other drivers."""


class Place(Record):
    """A disk, or a ``partition`` of it: its ``name``, as ``vda1``, and its first bytes."""

    name: str
    head: bytes = b""
    partition: Partition | None = None

    @property
    def content(self) -> str:
        """The file system's name, or another content's; "" if unknown."""
        return file_systems.detect(self.head) or file_systems.other_content(self.head)

    def __str__(self) -> str:
        return f"{self.name} ({self.content})" if self.content else self.name


class Root(Record):
    """``place`` is None if the root's place is unknown, or not there.

    ``table`` is the kind of partition table by which it is found: ``gpt``, ``dos``, ``any`` of the
    two, "" for none.
    """

    place: Place | None = None
    table: str = ""
    mistake: str = ""


def find_root(
    root: str,
    disks: int,
    read_disk: Callable[[int, int], bytes],
    *,
    has_initrd: bool,
    version: str = "",
) -> Root:
    """Find the place that ``root=`` names, for a kernel of ``version``, "" if unknown.

    ``read_disk`` gives the start of disk ``index`` from a byte on, nothing if it cannot be read.
    """
    seen = _Disks(disks, read_disk)
    link, _, name = root.removeprefix("/dev/disk/").partition("/")
    if root.startswith("/dev/disk/") and link in _BY_LINKS:
        if not has_initrd:
            return Root(mistake=f"root={root} is for an initramfs to find: the kernel alone knows "
                                "/dev/vda, PARTUUID= and PARTLABEL=")
        root = f"{_BY_LINKS[link]}={name}"
    kind, _, name = root.partition("=")
    if kind in ("UUID", "LABEL"):
        if not has_initrd:
            return Root(mistake=f"root={kind}= is for an initramfs to find: the kernel alone knows "
                                "/dev/vda, PARTUUID= and PARTLABEL=")
        found = _by_identity(seen, kind, name)
    elif kind == "PARTUUID":
        found = _by_partuuid(seen, name)
    elif kind == "PARTLABEL":
        matches = [place for place in seen.partitions() if _of(place).label == name]
        missing = "" if matches else _not_there(f"PARTLABEL={name}", "PARTLABEL", seen)
        found = Root(place=_one(matches), table="gpt", mistake=missing)
    elif root.startswith(DISK):
        found = _by_name(seen, root)
    elif disks and (meant := _meant(root)) is not None:
        return _by_other_name(seen, root, *meant, has_initrd=has_initrd, version=version)
    else:
        return Root()  # nothing of ours, or by number
    if found.place is None or found.mistake:
        return found
    return found.replace(mistake=_unmountable(root, found.place, seen, has_initrd, version))


class _Disks:
    """The disks of a run, each read once."""

    def __init__(self, count: int, read_disk: Callable[[int, int], bytes]) -> None:
        self.count = count
        self.read = read_disk
        self._heads: dict[int, bytes] = {}
        self._partitions: dict[int, tuple[Place, ...]] = {}

    def name(self, index: int) -> str:
        return f"vd{chr(ord('a') + index)}"

    def disk(self, index: int) -> Place:
        if index not in self._heads:
            self._heads[index] = self.read(index, 0)
        return Place(name=self.name(index), head=self._heads[index])

    def partitions_of(self, index: int) -> tuple[Place, ...]:
        if index not in self._partitions:
            self._partitions[index] = tuple(
                Place(name=f"{self.name(index)}{partition.number}", partition=partition,
                      head=self.read(index, partition.offset))
                for partition in read_partitions(lambda at: self.read(index, at))
            )
        return self._partitions[index]

    def index_of(self, place: Place) -> int:
        return ord(place.name[2]) - ord("a")

    def table_of(self, place: Place) -> str:
        """Return the kind of table by which ``place`` is found."""
        return table_kind(self.disk(self.index_of(place)).head) if place.partition else ""

    def partitions(self) -> Iterator[Place]:
        for index in range(self.count):
            yield from self.partitions_of(index)

    def places(self) -> Iterator[Place]:
        """Yield all that may hold a file system: partitions, and disks without any."""
        for index in range(self.count):
            yield from self.partitions_of(index) or (self.disk(index),)

    @property
    def are_known(self) -> bool:
        """True if all of them can be read."""
        return all(self.disk(index).head for index in range(self.count))


def _of(place: Place) -> Partition:
    assert place.partition is not None, "it came from a table"
    return place.partition


def _one(places: list[Place]) -> Place | None:
    return places[0] if len(places) == 1 else None


def _by_name(seen: _Disks, root: str) -> Root:
    """Find ``/dev/vda`` or ``/dev/vda1``."""
    letters = root[len(DISK) :].rstrip("0123456789")
    digits = root[len(DISK) + len(letters) :]
    index = ord(letters) - ord("a") if len(letters) == 1 else seen.count
    if not 0 <= index < seen.count:
        there = ", ".join(seen.name(disk) for disk in range(seen.count))
        return Root(mistake=f"root={root} is not there: root= and --disk must name it ({there})")
    disk = seen.disk(index)
    if not digits:
        return Root(place=disk)
    table = table_kind(disk.head)
    if not disk.head:
        return Root(table="any")
    for place in seen.partitions_of(index):
        if str(_of(place).number) == digits:  # for Linux "01" is no partition, either
            return Root(place=place, table=table)
    if not table and (problem := lost_gpt(disk.head)):
        return Root(table="any", mistake=f"root={root} is not there: {disk.name} {problem}")
    if not table:
        if disk.content and disk.content != "empty":
            return Root(table="any", mistake=f"root={root} is not there: {disk.name} has no "
                                             f"partitions, it is all {disk.content} "
                                             f"(root=/dev/{disk.name})")
        return Root(table="any", mistake=f"root={root} is not there: {disk.name} has no partition "
                                         "table")
    there = _listed(seen.partitions_of(index))
    return Root(table=table, mistake=f"root={root} is not there: {disk.name} has {there}")


def _meant(root: str) -> tuple[int, str] | None:
    """Return the number of the disk, and the partition or "", that the name ``root`` means.

    That is a name that Linux gives disks of other drivers, as ``/dev/sda1`` and ``/dev/nvme0n1p1``,
    or ``vda1``; None for any other.
    """
    name = root.removeprefix("/dev/")
    for prefix in _BY_LETTER:
        letter, digits = name[len(prefix) :][:1], name[len(prefix) + 1 :]
        is_number = not digits or whole_number(digits, 1, MAX_PARTITIONS) is not None
        if name.startswith(prefix) and "a" <= letter <= "z" and is_number:
            return ord(letter) - ord("a"), digits
    for prefix in _BY_NUMBER:
        if name.startswith(prefix):
            disk, _, digits = name.removeprefix(prefix).partition("p")
            number = whole_number(disk.partition("n")[0], 0, MAX_PARTITIONS)
            return None if number is None else (number, digits)
    return None


def _by_other_name(
    seen: _Disks, root: str, index: int, digits: str, *, has_initrd: bool, version: str
) -> Root:
    """Return the root that is meant by ``root``, the name of a disk that other machines have."""
    names = ", ".join(f"/dev/{seen.name(disk)}" for disk in range(seen.count))
    mistake = f"root={root} is not there: the disks here are {names}"
    if index >= seen.count:
        return Root(mistake=mistake)
    meant = f"/dev/{seen.name(index)}{digits}"
    found = find_root(meant, seen.count, seen.read, has_initrd=has_initrd, version=version)
    hint = found.mistake.removeprefix(f"root={meant} is not there: ")
    return found.replace(place=None, mistake=f"{mistake}; {hint or f'it is likely root={meant}'}")


def _by_partuuid(seen: _Disks, name: str) -> Root:
    uuid, _, rest = name.partition("/PARTNROFF=")
    table = "gpt" if len(uuid) == _GUID_LENGTH else "dos"
    matches = [place for place in seen.partitions() if _of(place).uuid == uuid.lower()]
    if not matches:
        return Root(table=table, mistake=_not_there(f"PARTUUID={uuid}", "PARTUUID", seen))
    if not rest:
        return Root(place=_one(matches), table=table)
    start = matches[0]
    sign, digits = (-1, rest[1:]) if rest.startswith("-") else (1, rest)
    distance = whole_number(digits, 0, 1 << 20)
    if distance is None:
        return Root(table=table, mistake=f"root=PARTUUID={name}: PARTNROFF= is not a number")
    number = _of(start).number + sign * distance
    for place in seen.partitions():
        if seen.index_of(place) == seen.index_of(start) and _of(place).number == number:
            return Root(place=place, table=table)
    return Root(table=table, mistake=f"root=PARTUUID={name} is not there: {start.name[:3]} has "
                                     f"no partition {number}")


def _by_identity(seen: _Disks, kind: str, name: str) -> Root:
    """Find ``UUID=`` and ``LABEL=``, as udev or busybox do."""
    is_sure = seen.are_known
    for place in seen.places():
        identity = file_systems.identity(place.head, place.content)
        if identity is None:
            is_sure = is_sure and place.content in (*_NO_ROOT, "vfat")
        elif (name.lower() == identity[0]) if kind == "UUID" else (name == identity[1]):
            return Root(place=place, table=seen.table_of(place))
    if not is_sure or (kind == "UUID" and len(name) != _GUID_LENGTH):
        return Root()
    return Root(mistake=_not_there(f"{kind}={name}", kind, seen))


def _not_there(what: str, kind: str, seen: _Disks) -> str:
    """Return the words that ``what`` is on no disk, and what is there; "" unless all are known."""
    if not seen.are_known:
        return ""
    found = []
    for place in seen.partitions() if kind.startswith("PART") else seen.places():
        if kind == "PARTUUID":
            value = _of(place).uuid
        elif kind == "PARTLABEL":
            value = _of(place).label
        else:
            identity = file_systems.identity(place.head, place.content)
            value = identity[kind == "LABEL"] if identity else ""
        found.append(f"{place.name} {value}" if value else place.name)
    disks = ", ".join(seen.name(index) for index in range(seen.count))
    there = _listed(found) if found else f"{disks}, without a partition table"
    return f"root={what} is on none of the disks; there are: {there}"


def _listed(items: tuple[Place, ...] | list[str]) -> str:
    texts = [str(item) for item in items[:_MAX_LISTED]]
    if len(items) > _MAX_LISTED:
        texts.append(f"{len(items) - _MAX_LISTED} more")
    return ", ".join(texts) or "no partitions"


def _unmountable(
    root: str, place: Place, seen: _Disks, has_initrd: bool, version: str
) -> str:
    """Return why the content of ``place`` is not mounted as the root; "" if it may be."""
    kind = file_systems.detect(place.head)
    if kind is None and place.partition is None and table_kind(place.head):
        partitions = seen.partitions_of(seen.index_of(place))
        if (better := _likely_root(partitions)) is not None:
            return (f"root={root} is a disk with partitions ({_listed(partitions)}): "
                    f"its root is likely root=/dev/{better.name}")
        return f"root={root} is a disk with partitions: {_listed(partitions)}"
    content = place.content
    if kind is None and place.partition is None and (problem := lost_gpt(place.head)):
        return f"root={root}: {place.name} {problem}"
    if content == "ntfs":
        return f"root={root} is ntfs, as a disk of Windows"
    if kind is None:
        if content in _NO_ROOT or (content in _NEEDS_HELP and not has_initrd):
            helper = "" if content in _NO_ROOT else ", which only an initramfs opens"
            what = "nothing but zeros" if content == "empty" else content
            if content == "empty" and has_initrd:
                return ""  # the initramfs may make a file system there
            return f"root={root} holds no file system to mount: {what}{helper}"
        return ""
    size = file_systems.block_bytes(place.head, kind)
    if size > PAGE_BYTES:
        since = _LARGE_BLOCKS_SINCE.get(kind)
        if since is None:
            return (f"root={root} is {kind} with blocks of {size} bytes; Linux on x86-64 mounts "
                    f"up to {PAGE_BYTES}, a page")
        if not _is_since(version, since):
            return (f"root={root} is {kind} with blocks of {size} bytes; before Linux "
                    f"{since[0]}.{since[1]} a block must not be larger than a page, {PAGE_BYTES}")
    if kind.startswith("ext") and (bits := file_systems.unknown_ext_features(place.head)):
        return f"root={root} is {kind} with features that no Linux mounts ({bits:#x})"
    return ""


def _likely_root(partitions: tuple[Place, ...]) -> Place | None:
    """Return the partition that is a root by its type, else the largest one with a file system."""
    good = [place for place in partitions if file_systems.detect(place.head)]
    typed = [place for place in good if _of(place).kind in ROOT_KINDS]
    return max(typed or good, key=lambda place: _of(place).length, default=None)


def _is_since(version: str, since: tuple[int, int]) -> bool:
    """True if the kernel's own text ``version`` is that of ``since`` or a later one."""
    numbers = version.replace("-", ".").split(".")[:2]
    known = [whole_number(number, 0, 1000) for number in numbers]
    return len(known) == 2 and None not in known and (known[0] or 0, known[1] or 0) >= since
