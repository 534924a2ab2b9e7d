"""What the loader's tests share: writing a file, loading it, and judging a refusal."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from pyvmm.errors import ConfigError
from pyvmm.memory import GuestMemory
from pyvmm.x86.loader import Kernel, load_kernel
from tests.support.kernels import MIB

MakeFile = Callable[[bytes | bytearray], Path]
RAM_BYTES = 8 * MIB


def blank(data: bytes | bytearray) -> bool:
    """Whether ``data`` is all zeros, found out quickly."""
    return data == bytes(len(data))


def refused(memory: GuestMemory, path: Path, *problem: str) -> None:
    """load_kernel refuses ``path`` in one line that has all of ``problem``, and stores nothing."""
    with pytest.raises(ConfigError) as caught:
        load_kernel(memory, path)
    subject, _, rest = str(caught.value).partition(": ")
    assert subject == str(path)
    assert "\n" not in rest
    for part in problem:
        assert part in rest
    assert blank(memory.read(0, memory.size_bytes))


def check_any_kernel(path: Path) -> None:
    """Whatever ``path`` holds: it is refused in one line, or loaded where a kernel may be."""
    ram = bytearray(RAM_BYTES)
    result = _load(GuestMemory.over(ram), path)
    if isinstance(result, ConfigError):
        assert str(result).startswith(f"{path}: ")
        assert "\n" not in str(result)
        assert blank(ram)
        return
    assert MIB <= result.start <= result.entry < result.end <= RAM_BYTES
    assert blank(ram[: result.start])
    assert blank(ram[result.end :])


def _load(memory: GuestMemory, path: Path) -> Kernel | ConfigError:
    try:
        return load_kernel(memory, path)
    except ConfigError as error:
        return error
