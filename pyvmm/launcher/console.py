"""The console of a machine in another process, fed from the events of its control socket."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable

from pyvmm.api.console import MAX_TYPED_BYTES, ConsoleHandle, ExpectError
from pyvmm.errors import PyvmmError


class VmConsole(ConsoleHandle):
    """``Vm.console``: ``text``, ``write``, ``expect`` and ``on_line`` as ``Machine.console`` has.

    ``send`` types bytes; ``raise_if_failed`` raises the error that somebody gave to the run.
    ``lost_bytes`` counts output that this process was too slow to take: the guest does not wait
    for it, and the file ``console_log`` has all.
    """

    def __init__(
        self,
        *,
        send: Callable[[bytes], None],
        refuse_own_threads: Callable[[str], None],
        run_hook: Callable[[str, Callable[..., object], object], None],
        raise_if_failed: Callable[[], None],
    ) -> None:
        super().__init__(
            refuse_own_threads=refuse_own_threads, wake=lambda: None, run_hook=run_hook,
            has_begun=lambda: True,
        )
        self._send = send
        self._raise_if_failed = raise_if_failed
        self._call_user = run_hook
        self._output_lock = threading.RLock()
        self._output_watchers: list[Callable[[bytes], object]] = []
        self.lost_bytes = 0

    def write(self, data: str | bytes) -> None:
        """Type ``data``: see ``ConsoleHandle.write``."""
        if isinstance(data, str):
            data = data.encode()
        elif not isinstance(data, (bytes, bytearray, memoryview)):
            raise TypeError(f"console.write takes str or bytes, not {type(data).__name__}")
        self._check_open("console.write()")
        if len(data) > MAX_TYPED_BYTES:
            raise PyvmmError(
                f"console.write: {len(data)} bytes; at most {MAX_TYPED_BYTES} may wait"
            )
        self._send(bytes(data))

    def expect(self, pattern: str | re.Pattern[str], timeout_s: float = 60.0) -> re.Match[str]:
        """Wait until ``pattern`` matches: see ``ConsoleHandle.expect``.

        Raises the error given to ``Vm.fail``, if there is one.
        """
        self._raise_if_failed()
        try:
            return super().expect(pattern, timeout_s)
        except ExpectError as error:
            unmet = error
        self._raise_if_failed()
        raise unmet

    def on_output(self, callback: Callable[[bytes], object]) -> None:
        """See ``Vm.on_output``."""
        if not callable(callback):
            raise TypeError(f"on_output takes a function, not {type(callback).__name__}")
        self._check_open("on_output()")
        with self._output_lock:
            with self._news:
                data = bytes(self._kept)
            if data:
                callback(data)
            self._output_watchers.append(callback)

    def feed(self, data: bytes) -> None:
        """Take what the guest printed; in the thread of the events."""
        with self._output_lock:
            super().feed(data)
            for callback in list(self._output_watchers):
                self._call_user("on_output", callback, data)
