"""qemu-storage-daemon (Debian's qemu-system-common), which serves a file as a vhost-user-blk
device: somebody else's back end for our front end."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path
from types import TracebackType

from tests.support.patience import patient

TIMEOUT_S = 20.0


class StorageDaemon:
    """A daemon that serves the raw image ``image`` on ``socket``, to one front end at a time.

    It accepts connections once this is made, and is dead when the context is left.
    """

    def __init__(
        self, image: Path, socket: Path, *, queues: int = 1, writable: bool = True
    ) -> None:
        self._log = socket.with_name(f"{socket.name}.log")
        ready = socket.with_name(f"{socket.name}.pid")
        on = "on" if writable else "off"
        command = [
            "qemu-storage-daemon",
            "--blockdev", f"driver=file,node-name=disk,filename={image},discard=unmap",
            "--export",
            f"type=vhost-user-blk,id=export,node-name=disk,writable={on},num-queues={queues},"
            f"addr.type=unix,addr.path={socket}",
            "--pidfile", str(ready),
        ]  # fmt: skip
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        # It writes its pid once everything on its command line is there.
        until_s = time.monotonic() + patient(TIMEOUT_S)
        while not ready.exists():
            assert self.process.poll() is None, self._log.read_text()
            assert time.monotonic() < until_s, f"no {ready}: {self._log.read_text()}"
            time.sleep(0.01)

    def kill(self) -> None:
        """SIGKILL; not an error if it has ended."""
        self.process.kill()
        self.process.wait()

    def __enter__(self) -> StorageDaemon:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.kill()
