"""CPU templates: JSON files of masks for registers of CPUID, one bit at a time.

::

    {"cpuid_modifiers": [
        {"leaf": "0x7", "subleaf": "0x0",
         "modifiers": [{"register": "ebx", "bitmap": "0b0xxxxx"}]}]}

The shape is that of Firecracker's custom CPU templates, less what pyvmm does not change (MSRs,
KVM capabilities).  docs/cpu-models.md is the reference.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterator
from types import MappingProxyType

from pyvmm.errors import ConfigError
from pyvmm.kvm.abi import KVM_CPUID_SIGNATURE
from pyvmm.x86.cpu_mask import OPTION, RegisterMask

MAX_BYTES = 1 << 20
_MAX_REGISTER = 0xFFFF_FFFF
_REGISTERS = ("eax", "ebx", "ecx", "edx")
_NUMBER = re.compile(r"0[xX][0-9a-fA-F]+")
_BITMAP = re.compile(r"0b[01xX_]+")
_QUOTED = 40
"""Characters of the file that a message quotes at most."""

_TOPOLOGY = "describes the topology, which is the guest's own"
_NOT_MASKED = MappingProxyType({
    0xB: _TOPOLOGY,
    0x1F: _TOPOLOGY,
    0x8000_001E: _TOPOLOGY,
    0xD: "describes the extended state, which follows from features such as avx",
    KVM_CPUID_SIGNATURE: "is by which the guest knows KVM",
})


def read_template(path: str) -> tuple[RegisterMask, ...]:
    """Return the masks in the file ``path``; ConfigError names it, the field and the mistake."""
    subject = f"{OPTION} {path}"
    try:
        return tuple(_masks(_parse(_read(path))))
    except OSError as error:
        raise ConfigError(subject, error.strerror or str(error)) from error
    except RecursionError:
        raise ConfigError(subject, "is no JSON that nests so deep") from None
    except ValueError as error:
        raise ConfigError(subject, str(error)) from error


def _read(path: str) -> str:
    # O_NONBLOCK: opening a FIFO must not wait for a writer.
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    with open(fd, "rb") as file:  # noqa: PTH123 - a descriptor has no path
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise ValueError("is not a regular file")
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise ValueError(f"is larger than {MAX_BYTES >> 20} MiB, the limit")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8 at byte {error.start}") from error


def _parse(text: str) -> object:
    try:
        return json.loads(text, object_pairs_hook=_object, parse_int=_integer)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"is not JSON: {error.msg}, line {error.lineno} column {error.colno}"
        ) from error


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found: dict[str, object] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"field {_quoted(name)} is given twice in one object")
        found[name] = value
    return found


def _integer(digits: str) -> int:
    """Return ``digits`` as a number, cut to one digit more than a message quotes.

    Python refuses thousands of digits without saying in which field.  A number of this length is
    out of range all the same, and the field's own check says so.
    """
    return int(digits[: _QUOTED + 1])


def _masks(template: object) -> Iterator[RegisterMask]:
    seen: set[tuple[int, int]] = set()
    fields = _fields(template, "the file", ("cpuid_modifiers",))
    for number, entry in enumerate(_list(fields["cpuid_modifiers"], "cpuid_modifiers")):
        where = f"cpuid_modifiers[{number}]"
        fields = _fields(entry, where, ("leaf", "modifiers"), optional=("subleaf",))
        leaf = _number(fields["leaf"], f"{where}.leaf")
        subleaf = _number(fields.get("subleaf", 0), f"{where}.subleaf")
        if leaf in _NOT_MASKED and (leaf, subleaf) != (0xD, 1):
            raise ValueError(f"{where}: leaf {leaf:#x} {_NOT_MASKED[leaf]}")
        if (leaf, subleaf) in seen:
            raise ValueError(f"{where}: leaf {leaf:#x} subleaf {subleaf:#x} is given twice")
        seen.add((leaf, subleaf))
        registers: set[str] = set()
        for index, modifier in enumerate(_list(fields["modifiers"], f"{where}.modifiers")):
            mask = _mask(modifier, f"{where}.modifiers[{index}]", leaf, subleaf)
            register = mask.word[2]
            if register in registers:
                raise ValueError(f"{where}: register {register} is given twice")
            registers.add(register)
            yield mask


def _mask(modifier: object, where: str, leaf: int, subleaf: int) -> RegisterMask:
    fields = _fields(modifier, where, ("register", "bitmap"))
    register, bitmap = fields["register"], fields["bitmap"]
    if not isinstance(register, str) or register not in _REGISTERS:
        raise ValueError(
            f"{where}.register: {_quoted(register)} is none of {', '.join(_REGISTERS)}"
        )
    if not isinstance(bitmap, str) or not _BITMAP.fullmatch(bitmap):
        raise ValueError(
            f"{where}.bitmap: {_quoted(bitmap)} is not 0b and then digits 0, 1 and x, highest first"
        )
    digits = bitmap[2:].replace("_", "").lower()
    if not 1 <= len(digits) <= 32:
        raise ValueError(f"{where}.bitmap: has {len(digits)} digits; a register has 32 bits")
    digits = digits.rjust(32, "x")
    return RegisterMask(
        word=(leaf, subleaf, register),
        keep=int("".join("0" if digit == "0" else "1" for digit in digits), 2),
        demand=int(digits.replace("x", "0"), 2),
    )


def _fields(
    value: object, where: str, needed: tuple[str, ...], optional: tuple[str, ...] = ()
) -> dict[str, object]:
    """Return ``value``, an object with all fields of ``needed`` and none but those and
    ``optional``."""
    if not isinstance(value, dict):
        raise ValueError(f"{where}: is {_quoted(value)}, not an object with {', '.join(needed)}")
    known = (*needed, *optional)
    for name in value:
        if name not in known:
            raise ValueError(
                f"{where}: unknown field {_quoted(name)}; the fields are {', '.join(known)}"
            )
    for name in needed:
        if name not in value:
            raise ValueError(f"{where}: has no field {name!r}")
    return value


def _list(value: object, where: str) -> list[object]:
    if not isinstance(value, list):
        raise ValueError(f"{where}: is {_quoted(value)}, not a list")
    return value


def _number(value: object, where: str) -> int:
    """Return a JSON number or a hexadecimal string as a number of 32 bits; ValueError."""
    if isinstance(value, str) and _NUMBER.fullmatch(value):
        number = int(value, 16)
    elif isinstance(value, int) and not isinstance(value, bool):
        number = value
    else:
        raise ValueError(f"{where}: {_quoted(value)} is neither a number nor text like '0x7'")
    if not 0 <= number <= _MAX_REGISTER:
        raise ValueError(f"{where}: {_quoted(value)} is not a number of 32 bits")
    return number


def _quoted(value: object) -> str:
    """Return ``value`` as JSON would write it, on one line of bounded length."""
    text = json.dumps(value)
    return text if len(text) <= _QUOTED else f"{text[:_QUOTED]}..."
