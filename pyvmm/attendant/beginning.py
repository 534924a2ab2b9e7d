"""The first message to an attendant: all that it will ever know of its machine and may do for it.

The machine's process sends it before the guest runs, so it can be trusted; nothing that comes later
adds to it.
"""

from __future__ import annotations

from pyvmm.attendant.messages import BEGIN, MAX_BEGIN_BYTES, encode
from pyvmm.startup.types import Record

_BETWEEN = "\0"  # in no file name and no option


class Beginning(Record):
    """A start's words to its attendant.  Texts are as in the options; None: not given.

    ``version`` is pyvmm's: an attendant of another one does nothing.  ``kernel`` to ``discovery``
    are ``RunConfig``'s, ``disks`` the location of each disk whose first bytes are those in its
    file, "-" for another one.  ``modules`` are those to put into ``bundle``.

    ``snapshot_path``, ``any_snapshot`` and ``most_scratch_files`` are ``Duties``'.  ``socket_name``
    is the name of a socket in the directory that is handed over, ``socket_device`` and
    ``socket_inode`` tell that socket from another one.  ``terminal`` has the modes of the
    terminal that is handed over (``start``).  ``uid`` and ``gid`` are those of ``--user``, -1
    without it.  With ``is_silent`` another attendant tells how the machine has ended.
    """

    version: str
    bundle: str
    kernel: str
    initrd: str | None = None
    cmdline: str | None = None
    append: str = ""
    agent: str = "none"
    discovery: str = "both"
    cpus: int = 1
    disks: tuple[str, ...] = ()
    kernel_version: str = ""
    is_linux: bool = True
    modules: tuple[str, ...] = ()
    snapshot_path: str | None = None
    any_snapshot: bool = False
    most_scratch_files: int = 0
    socket_name: str = ""
    socket_device: int = 0
    socket_inode: int = 0
    terminal: str = ""
    uid: int = -1
    gid: int = -1
    is_silent: bool = False

    @property
    def hands_out_files(self) -> bool:
        """True if the machine may ask for files."""
        return bool(
            self.any_snapshot or self.snapshot_path is not None or self.most_scratch_files
        )

    @property
    def has_work_at_the_end(self) -> bool:
        """True if there is something to do even after a run that asks for nothing."""
        return bool(self.socket_name or self.modules)

    def message(self) -> bytes:
        """Return the datagram; ValueError if it is too long."""
        values = []
        for name in self._fields:
            value = getattr(self, name)
            if isinstance(value, tuple):
                value = _BETWEEN.join(value)
            values.append(0 if value is None else value)
        data = encode(BEGIN, *values)
        if len(data) > MAX_BEGIN_BYTES:
            raise ValueError(f"it would have {len(data)} bytes, the limit is {MAX_BEGIN_BYTES}")
        return data

    @classmethod
    def read(cls, data: bytes) -> Beginning:
        """Return what ``message`` made of it; ValueError, also if another version made it."""
        from pyvmm.attendant.reading import decode  # only the attendant reads

        kind, values = decode(data, most_bytes=MAX_BEGIN_BYTES)
        if kind != BEGIN or len(values) != len(cls._fields):
            raise ValueError("the first message is not a beginning")
        given: dict[str, object] = dict(zip(cls._fields, values, strict=True))
        for name in ("disks", "modules"):
            given[name] = tuple(str(given[name]).split(_BETWEEN)) if given[name] else ()
        for name in ("initrd", "cmdline", "snapshot_path"):
            given[name] = given[name] if isinstance(given[name], str) else None
        for name in ("is_linux", "any_snapshot", "is_silent"):
            given[name] = bool(given[name])
        return cls(**given)  # type: ignore[arg-type]
