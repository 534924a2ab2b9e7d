"""A directory in the place of a kernel: a built tree, or one that ``kernel fetch`` or ``kernel
build`` filled."""

from __future__ import annotations

import os

from pyvmm.errors import ConfigError

_BUILT = ("arch/x86/boot/bzImage", "bzImage")


def is_source_tree(directory: str | os.PathLike[str]) -> bool:
    """Return True if ``directory`` is the top of a kernel's source."""
    return os.path.isfile(os.path.join(directory, "Makefile")) and os.path.isdir(
        os.path.join(directory, "arch", "x86")
    )


def kernel_in(directory: str) -> tuple[str, str | None]:
    """Return the kernel in ``directory``, and the initramfs that was fetched with it, if any.

    ConfigError, with the command that builds it, for a tree that is not built; also for a
    directory with no kernel, or with several.
    """
    for name in _BUILT:
        path = os.path.join(directory, name)
        if os.path.isfile(path):
            return path, None
    if is_source_tree(directory):
        raise ConfigError(
            directory, "is a kernel tree in which no arch/x86/boot/bzImage is built; run: "
            f"pyvmm kernel build {directory}"
        )
    try:
        names = sorted(os.listdir(directory))
    except OSError as error:
        raise ConfigError(directory, str(error.strerror)) from error
    kernels = [name for name in names if name.startswith("vmlinuz-")]
    if len(kernels) > 1:
        raise ConfigError(directory, f"has several kernels; choose one: {', '.join(kernels)}")
    if not kernels:
        raise ConfigError(
            directory, "is a directory with no kernel in it (arch/x86/boot/bzImage, bzImage or "
            "vmlinuz-*)"
        )
    initramfs = f"initramfs-{kernels[0].removeprefix('vmlinuz-')}.cpio.gz"
    return os.path.join(directory, kernels[0]), (
        os.path.join(directory, initramfs) if initramfs in names else None
    )
