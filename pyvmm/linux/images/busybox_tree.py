"""The files of our own image: busybox, our init, and the programs for our ports."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from pyvmm.linux.busybox import find_busybox
from pyvmm.linux.cache import Say

HERE = Path(__file__).resolve().parent
INIT = HERE / "init"
PROGRAMS = tuple(HERE / name for name in ("pyvmm-exit", "pyvmm-mark", "pyvmm-warm"))
"""Built by ``guest/exit/build.py``."""
AGENT = HERE.parents[1] / "agent/pyvmm-agent"

DIRECTORIES = ("bin", "sbin", "usr/bin", "usr/sbin", "dev", "proc", "sys", "etc", "root", "run",
               "mnt", "tmp", "var/tmp")
STICKY = ("tmp", "var/tmp")
FILES = {
    "etc/passwd": "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n",
    "etc/group": "root:x:0:\nnogroup:x:65534:\n",
    "etc/hostname": "pyvmm\n",
    "etc/hosts": "127.0.0.1 localhost pyvmm\n",
    "etc/profile": "export PS1='pyvmm:\\w\\$ '\n",
}


def make_tree(root: Path, say: Say) -> None:
    """Fill the empty directory ``root`` with the image's files."""
    for name in DIRECTORIES:
        (root / name).mkdir(parents=True)
    for name in STICKY:
        (root / name).chmod(0o1777)
    for name, text in FILES.items():
        (root / name).write_text(text)
    busybox = root / "bin/busybox"
    work = root / "busybox.work"
    work.mkdir()
    busybox.write_bytes(find_busybox(work, say))
    busybox.chmod(0o755)
    shutil.rmtree(work)
    listed = subprocess.run([busybox, "--list-full"], capture_output=True, text=True, check=True)
    for applet in listed.stdout.split():
        if applet not in ("bin/busybox", "sbin/init", "linuxrc"):
            (root / applet).parent.mkdir(parents=True, exist_ok=True)
            (root / applet).symlink_to("/bin/busybox")
    shutil.copyfile(INIT, root / "sbin/init")
    for program in (*PROGRAMS, AGENT):
        # The agent is not there in a checkout that has not built one yet.
        if program.exists():
            shutil.copyfile(program, root / "sbin" / program.name)
            (root / "sbin" / program.name).chmod(0o755)
    (root / "sbin/init").chmod(0o755)
    os.symlink("sbin/init", root / "init")  # the place where the kernel looks in an initramfs
