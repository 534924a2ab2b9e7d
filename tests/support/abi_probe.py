"""A module of kernel numbers and structures against the system's own headers, by a C probe that
is generated from the module itself."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from pyvmm.kvm.abi import Ioctl, Structure

Facts = dict[str, int]
_HELPERS = {"Structure", "Ioctl", "IOCTL_NAMES", "annotations", "ctypes", "MappingProxyType"}


class AbiModule:
    """What ``module`` declares.  Names with an underscore are its tools, nameless types and
    padding, and not looked at."""

    def __init__(self, module: ModuleType, *headers: str) -> None:
        self.headers = headers
        self.public = {
            name: value
            for name, value in vars(module).items()
            if name.isidentifier() and not name.startswith("_") and name not in _HELPERS
        }
        self.structures = {
            name: value
            for name, value in self.public.items()
            if isinstance(value, type) and issubclass(value, Structure)
        }
        self.ioctls: Facts = {
            name: int(value) for name, value in self.public.items() if isinstance(value, Ioctl)
        }
        self.constants: Facts = {
            name: value
            for name, value in self.public.items()
            if isinstance(value, int) and not isinstance(value, Ioctl)
        }
        self.ioctl_names: Facts = {
            name: int(number) for number, name in vars(module)["IOCTL_NAMES"].items()
        }

    def claims(self) -> Facts:
        """Everything declared, keyed by the C expression that must have that value."""
        facts = {**self.ioctls, **self.constants}
        for name, kind in self.structures.items():
            facts[f"sizeof(struct {name})"] = ctypes.sizeof(kind)
            for path, offset, size in _fields(kind):
                facts[f"offsetof(struct {name}, {path})"] = offset
                if size:  # a flexible array member has an offset, but no size in C
                    facts[f"sizeof(((struct {name} *)0)->{path})"] = size
        return facts

    def as_c_has_it(self, folder: Path) -> Facts:
        """The same expressions, as the C compiler evaluates them; the probe is made in
        ``folder``."""
        compiler = shutil.which("gcc")
        if compiler is None:
            pytest.fail("gcc is not installed: apt-get install gcc libc6-dev linux-libc-dev")
        includes = ("stddef.h", "stdio.h", "sys/ioctl.h", *self.headers)
        prints = [
            f'    printf("%s\\t%llu\\n", "{one}", (unsigned long long)({one}));'
            for one in self.claims()
        ]
        source = folder / "probe.c"
        source.write_text("\n".join([
            *(f"#include <{header}>" for header in includes),
            "int main(void)", "{", *prints, "    return 0;", "}", "",
        ]))
        program = folder / "probe"
        build = subprocess.run(
            [compiler, "-o", str(program), str(source)], capture_output=True, text=True, check=False
        )
        if build.returncode:
            pytest.fail(f"the probe does not compile:\n{build.stderr}")
        output = subprocess.run([str(program)], capture_output=True, text=True, check=True).stdout
        pairs = (line.split("\t") for line in output.splitlines())
        return {expression: int(value) for expression, value in pairs}

    def gaps(self) -> list[str]:
        """Fields that do not begin where the one before ends, and structures that go on behind
        their last field: padding is to be explicit, so that no field of C hides in it."""
        found = []
        for name, kind in self.structures.items():
            end = 0
            for field, field_type, *_ in kind._fields_:
                if getattr(kind, field).offset != end:
                    found.append(f"{name}.{field}")
                end += ctypes.sizeof(field_type)
            if end != ctypes.sizeof(kind):
                found.append(name)
        return found


def _fields(
    kind: type[ctypes.Structure | ctypes.Union], path: str = "", base: int = 0
) -> Iterator[tuple[str, int, int]]:
    """``(C path, offset, size)`` of every field, those of nested structures included."""
    anonymous = getattr(kind, "_anonymous_", ())
    for name, field_type, *_ in kind._fields_:
        offset = base + getattr(kind, name).offset
        if name in anonymous:
            assert issubclass(field_type, ctypes.Structure | ctypes.Union)
            yield from _fields(field_type, path, offset)
        elif not name.startswith("_"):
            yield path + name, offset, ctypes.sizeof(field_type)
            if issubclass(field_type, ctypes.Structure | ctypes.Union):
                yield from _fields(field_type, f"{path}{name}.", offset)
