"""``pyvmm run`` without a word: the lines that bring a person to a booted guest."""

from __future__ import annotations

import platform

from pyvmm.report import complain, say

USAGE_STATUS = 125


def show_first_steps() -> int:
    """Print how to come from nothing to a shell in a guest; return the status of a mistake."""
    say("run boots a kernel with disks.  From nothing to a shell in a guest:")
    complain(f"  pyvmm kernel fetch {_kernel_source()} --out kernel")
    complain("  pyvmm image build --busybox root.img")
    complain("  pyvmm run --kernel kernel --disk root.img --append pyvmm.shell")
    complain("pyvmm run --help has all options; pyvmm doctor says what this host's KVM can do.")
    return USAGE_STATUS


def _kernel_source() -> str:
    """Return the word for ``kernel fetch`` that suits this host."""
    try:
        known = platform.freedesktop_os_release()
    except OSError:
        return "FILE.deb"
    like = [known.get("ID", ""), *known.get("ID_LIKE", "").split()]
    return next((name for name in ("ubuntu", "debian") if name in like), "FILE.deb")
