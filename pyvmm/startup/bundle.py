"""The compiled code of a run's modules in one file, so that Python need not look for 140 of them.

For every module Python asks for half a dozen names in as many system calls.  Then Python opens,
examines and reads a ``.pyc``, with a page of Python code in between.  That is more work than the
top level of most of our modules; where files are far (over 9p in the lab) it is 3 ms a module.
So the first run leaves ``__pycache__/run.<tag>.bundle`` behind, and later runs import from it.  A
restore has a bundle of its own, because every start reads the index of all that is in one.

Half of the remaining time is Python's import machinery, 80 us a module.  So the loader of one of
our modules first makes our modules that the ``import`` statements at its left edge name.  The
statements then find these in ``sys.modules``.  (The standard library has circles, which need the
machinery.)

The bundle is a ``.pyc`` in all but number, and lies beside the code:

* A bundle is not read if its owner is neither root, nor the code's owner, nor our user, or if
  other users may write it.  Another Python does not use it.
* A module is not taken from the bundle if its source has another size or modification time now.
* A run without the right to write, with ``PYTHONDONTWRITEBYTECODE`` or with ``-B`` writes none.
"""

from __future__ import annotations

import marshal
import mmap
import os
import struct
import sys

from pyvmm.startup.types import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any, Self

    # File, True for a package, st_mtime_ns and st_size of the file, the modules it needs,
    # marshalled code.
    Entry = tuple[str, bool, int, int, tuple[str, ...], bytes | memoryview]

WORTH_WRITING = 8
"""Write the bundle anew for so many new modules; one or two more options of a run bring fewer."""
_OURS = os.path.dirname(os.path.dirname(__file__))
_STANDARD = os.path.dirname(os.__file__)


def default_path(command: str = "run") -> str:
    """Return the path at which this Python and this copy of pyvmm have the bundle of ``command``.
    """
    tag = f"{sys.implementation.cache_tag}-{sys.hexversion:x}-O{sys.flags.optimize}"
    return os.path.join(_OURS, "__pycache__", f"{command}.{tag}.bundle")


class Bundle:
    """A finder of modules (``sys.meta_path``) while it is entered.

    The finder knows no module if there is no good file at ``path``.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._entries = _read(path)
        self._known: set[str] = set()

    def __enter__(self) -> Self:
        self._known = set(sys.modules)
        sys.meta_path.insert(0, self)
        return self

    def __exit__(self, *_exc: object) -> None:
        """Find modules no longer."""
        if self in sys.meta_path:
            sys.meta_path.remove(self)

    def find_spec(
        self, name: str, _path: Sequence[str] | None = None, _target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the spec of module ``name``, if the bundle has it and its source is unchanged.

        This is ``importlib.abc.MetaPathFinder``'s.
        """
        entry = self._entries.get(name)
        if entry is None:
            return None
        file, is_package, mtime_ns, size, needs, code = entry
        try:
            now = os.stat(file)
        except OSError:
            return None
        if (now.st_mtime_ns, now.st_size) != (mtime_ns, size):
            return None
        loader: Any = _Loader(self, needs, code, file)
        spec = type(sys.__spec__)(name, loader, origin=file)
        if is_package:
            spec.submodule_search_locations = [os.path.dirname(file)]
        return spec

    def make(self, name: str) -> None:
        """Import module ``name`` as Python would, if ``find_spec`` finds it.

        Else do nothing: the ``import`` statement looks elsewhere.
        """
        parent, _, own_name = name.rpartition(".")
        if parent and parent not in sys.modules:
            self.make(parent)
        if name in sys.modules or (parent and parent not in sys.modules):
            return
        spec = self.find_spec(name)
        if spec is None or spec.loader is None:
            return
        module = type(sys)(name)
        module.__spec__, module.__loader__, module.__package__ = spec, spec.loader, spec.parent
        if spec.submodule_search_locations is not None:
            module.__path__ = spec.submodule_search_locations
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            sys.modules.pop(name, None)
            raise
        if parent:
            setattr(sys.modules[parent], own_name, module)

    def left_out(self) -> set[str]:
        """Return the modules imported since ``__enter__`` that the bundle lacked but could hold."""
        return {
            name for name in set(sys.modules) - self._known
            if not isinstance(getattr(sys.modules[name], "__loader__", None), _Loader)
            and _source(name)
        }

    def update(self, names: Iterable[str]) -> None:
        """Write the file anew with the modules ``names`` too, if that is worth it and allowed.

        The write is atomic, and errors are ignored: a missing bundle only costs time.
        """
        added = set(names)
        if len(added) < WORTH_WRITING or sys.dont_write_bytecode:
            return
        entries = dict(self._entries)
        for name in added:
            if entry := _entry(name):
                entries[name] = entry
        data = _encode(entries)
        temporary = f"{self.path}.{os.urandom(8).hex()}"
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            fd = os.open(temporary, flags, 0o644)  # no umask lets other users write it
            try:
                written = os.write(fd, data)
            finally:
                os.close(fd)
            if written == len(data):
                os.replace(temporary, self.path)
            else:
                _unlink(temporary)
        except OSError:
            _unlink(temporary)


class _Loader:
    """``importlib.abc.Loader`` of one module."""

    def __init__(
        self, bundle: Bundle, needs: tuple[str, ...], code: bytes | memoryview, file: str
    ) -> None:
        self._bundle: Bundle | None = bundle
        self._needs = needs
        self._code = code
        self._file = file

    def create_module(self, _spec: ModuleSpec) -> None:
        """Return None: an ordinary module will do."""

    def exec_module(self, module: ModuleType) -> None:
        """Import the modules that ``module`` needs, then run its code."""
        module.__file__ = self._file
        # With the last of them the bundle's mapping goes, which holds a descriptor.
        bundle, self._bundle = self._bundle, None
        for name in self._needs:
            if name not in sys.modules and bundle is not None:
                bundle.make(name)
        try:
            code = marshal.loads(self._code)
        except (ValueError, EOFError, TypeError):  # damaged: the source is there
            with open(self._file, "rb") as source:  # noqa: PTH123 - pathlib takes 8 ms
                code = compile(source.read(), self._file, "exec")
            if bundle is not None:
                _unlink(bundle.path)
        self._code = b""
        exec(code, module.__dict__)


# The file: the length of the index; the index, marshalled; the modules' code, one after another.
_HEAD = struct.Struct("<Q")


def _unlink(path: str) -> None:
    try:
        os.unlink(path)
    except OSError:
        return


def _read(path: str) -> dict[str, Entry]:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            status = os.fstat(fd)
            ours = status.st_uid in (0, os.geteuid()) or status.st_uid == os.stat(__file__).st_uid
            if not ours or status.st_mode & 0o170022 != 0o100000:  # S_IFREG, nobody else writes
                return {}
            # A mapping copies nothing, and reads only the pages that are looked at.
            data = memoryview(mmap.mmap(fd, 0, prot=mmap.PROT_READ))
        finally:
            os.close(fd)
        (index_bytes,) = _HEAD.unpack_from(data)
        at = _HEAD.size + index_bytes
        entries: dict[str, Entry] = {}
        ours, standard, index = marshal.loads(data[_HEAD.size : at])
        if (ours, standard) != (_OURS, _STANDARD):
            return {}  # a copied tree: the code would name files of the original tree
        for name, file, is_package, mtime_ns, size, needs, length in index:
            entries[name] = file, is_package, mtime_ns, size, needs, data[at : at + length]
            at += length
    except (OSError, ValueError, EOFError, TypeError, struct.error):
        return {}
    return entries if at == len(data) else {}


def _encode(entries: dict[str, Entry]) -> bytes:
    index = []
    for name, (file, is_package, mtime_ns, size, needs, code) in entries.items():
        index.append((name, file, is_package, mtime_ns, size, needs, len(code)))
    head = marshal.dumps((_OURS, _STANDARD, index))
    codes = b"".join(entry[-1] for entry in entries.values())
    return _HEAD.pack(len(head)) + head + codes


def _source(name: str) -> str:
    """Return the source file of loaded module ``name``; "" if neither ours nor standard."""
    file = getattr(sys.modules[name], "__file__", None) or ""
    ours = file.startswith(f"{_OURS}/") and name.partition(".")[0] == "pyvmm"
    is_ours_or_standard = ours or os.path.dirname(file) in (
        _STANDARD, f"{_STANDARD}/{name.partition('.')[0]}"
    )
    return file if file.endswith(".py") and is_ours_or_standard else ""


def _entry(name: str) -> Entry | None:
    """Return the entry of loaded module ``name``; None if its code is not available."""
    spec = sys.modules[name].__spec__
    file = _source(name)
    try:
        before = os.stat(file)
        code = spec.loader.get_code(name)  # type: ignore[union-attr]
        needs = tuple(_needs(file)) if name.startswith("pyvmm.") else ()
    except Exception:  # a source that is being edited may be anything; the run has ended well
        return None
    is_package = spec is not None and spec.submodule_search_locations is not None
    return file, is_package, before.st_mtime_ns, before.st_size, needs, marshal.dumps(code)


def _needs(file: str) -> Iterator[str]:
    """Yield our loaded modules that the ``import`` statements at the left edge of ``file`` name.

    Statements in functions, and under ``if TYPE_CHECKING:`` or ``try:``, do not count.
    """
    with open(file, encoding="utf-8") as source:  # noqa: PTH123 - pathlib takes 8 ms
        lines = source.read().split("\n")
    for line in lines:
        words = line.replace(",", " ").split()
        if line.startswith("from pyvmm.") and words[2:3] == ["import"]:
            submodules = [f"{words[1]}.{word}" for word in words[3:]]
            yield from (name for name in (words[1], *submodules) if name in sys.modules)
