"""What every test may take for granted."""

from __future__ import annotations

import signal

# A shell's background job starts with SIGINT ignored, and pyvmm leaves ignored what was: the tests
# that interrupt one would wait for ever (`make test &`, some CI runners).
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
