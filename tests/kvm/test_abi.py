"""abi.py against the system's own <linux/kvm.h>, by a C probe generated from abi.py itself."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Iterator

import pytest

from pyvmm.kvm import abi

Facts = dict[str, int]
_HELPERS = {"Structure", "Ioctl", "IOCTL_NAMES", "annotations", "ctypes", "MappingProxyType"}


def _public() -> dict[str, object]:
    """Everything abi.py declares; names with an underscore are its tools and nameless types."""
    return {
        name: value
        for name, value in vars(abi).items()
        if not name.startswith("_") and name not in _HELPERS
    }


def _structures() -> dict[str, type[ctypes.Structure]]:
    return {
        name: value
        for name, value in _public().items()
        if isinstance(value, type) and issubclass(value, ctypes.Structure)
    }


def _ioctls() -> Facts:
    return {name: int(value) for name, value in _public().items() if isinstance(value, abi.Ioctl)}


def _constants() -> Facts:
    return {
        name: value
        for name, value in _public().items()
        if isinstance(value, int) and not isinstance(value, abi.Ioctl)
    }


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
            continue
        yield path + name, offset, ctypes.sizeof(field_type)
        if issubclass(field_type, ctypes.Structure | ctypes.Union):
            yield from _fields(field_type, f"{path}{name}.", offset)


def _expected() -> Facts:
    """Everything that abi.py claims, keyed by the C expression that must have that value."""
    facts = {**_ioctls(), **_constants()}
    for name, kind in _structures().items():
        facts[f"sizeof(struct {name})"] = ctypes.sizeof(kind)
        for path, offset, size in _fields(kind):
            facts[f"offsetof(struct {name}, {path})"] = offset
            if size:  # a flexible array member has an offset, but no size in C
                facts[f"sizeof(((struct {name} *)0)->{path})"] = size
    return facts


@pytest.fixture(scope="module")
def kernel_facts(tmp_path_factory: pytest.TempPathFactory) -> Facts:
    """The same expressions, as the C compiler evaluates them."""
    compiler = shutil.which("gcc")
    if compiler is None:
        pytest.fail("gcc is not installed: apt-get install gcc libc6-dev linux-libc-dev")
    folder = tmp_path_factory.mktemp("abi")
    lines = (f'    printf("%s\\t%llu\\n", "{e}", (unsigned long long)({e}));' for e in _expected())
    source = folder / "probe.c"
    source.write_text(
        "#include <stddef.h>\n#include <stdio.h>\n#include <sys/ioctl.h>\n"
        "#include <linux/kvm.h>\n#include <asm/kvm_para.h>\n"
        "int main(void)\n{\n" + "\n".join(lines) + "\n    return 0;\n}\n"
    )
    program = folder / "probe"
    build = subprocess.run(
        [compiler, "-o", str(program), str(source)], capture_output=True, text=True, check=False
    )
    if build.returncode:
        pytest.fail(f"the probe does not compile:\n{build.stderr}")
    output = subprocess.run([str(program)], capture_output=True, text=True, check=True).stdout
    pairs = (line.split("\t") for line in output.splitlines())
    return {expression: int(value) for expression, value in pairs}


def test_every_number_size_and_offset_is_the_kernels(kernel_facts: Facts) -> None:
    assert _expected() == kernel_facts


def test_the_probe_covers_every_public_name_of_abi() -> None:
    covered = {*_ioctls(), *_constants(), *_structures()}
    assert set(_public()) == covered
    assert len(_ioctls()) > 20
    assert len(_structures()) > 10


def test_structures_have_no_undeclared_gaps_in_the_middle() -> None:
    """Padding is explicit, so no field of C hides between two of ours."""
    for name, kind in _structures().items():
        end = 0
        for field, field_type, *_ in kind._fields_:
            assert getattr(kind, field).offset == end, f"{name}.{field}"
            end += ctypes.sizeof(field_type)
        assert end == ctypes.sizeof(kind), name


def test_every_ioctl_has_a_name_for_errors() -> None:
    assert {name: int(number) for number, name in abi.IOCTL_NAMES.items()} == _ioctls()


@pytest.mark.parametrize(("field", "value"), [("slot", 1 << 32), ("flags", -1)])
def test_a_value_that_does_not_fit_its_field_is_refused(field: str, value: int) -> None:
    with pytest.raises(ValueError, match=rf"kvm_userspace_memory_region\.{field}"):
        abi.kvm_userspace_memory_region(**{field: value})
    with pytest.raises(ValueError, match="does not fit"):
        setattr(abi.kvm_userspace_memory_region(), field, value)


def test_a_misspelt_field_is_refused() -> None:
    with pytest.raises(AttributeError):
        abi.kvm_regs().raz = 1
    with pytest.raises(AttributeError):
        abi.kvm_regs(raz=1)
