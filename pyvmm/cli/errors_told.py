"""Errors at the command line: one line each, and an exit status."""

from __future__ import annotations

import gc
import os
import sys

from pyvmm.errors import PyvmmError
from pyvmm.startup.types import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

HOST_ERROR_STATUS = 125
_SIGINT, _SIGPIPE = 2, 13  # as in `signal`, whose imports would cost a start too much


def guarded(command: str, rest: list[str], run: Callable[[], int]) -> int:
    """Return what ``run`` returns, which is ``command`` with the words ``rest``.

    An error is one line and status 125.
    """
    try:
        return run()
    except PyvmmError as error:
        show_traceback(rest)
        say_error(str(_shortage(command, error) or error))
        return HOST_ERROR_STATUS
    except (OSError, RuntimeError) as error:
        if isinstance(error, BrokenPipeError):
            return output_failed(error)
        show_traceback(rest)
        # Neither the guest's fault nor the user's: this host lacks descriptors, threads or room.
        say_error(str(_shortage(command, error) or f"this host: {error}"))
        return HOST_ERROR_STATUS
    except KeyboardInterrupt:
        return 128 + _SIGINT
    finally:
        gc.enable()


def _shortage(command: str, error: Exception) -> PyvmmError | None:
    """Return the error for too few open files; None if ``command`` reports that itself."""
    if command in ("run", "restore", "export"):
        return None
    from pyvmm.cli.descriptors import MANY_FILES
    from pyvmm.open_files import shortage

    return shortage(error, MANY_FILES, f"pyvmm {command}")


def output_failed(error: OSError) -> int:
    """Discard further standard output, which takes no more, and return the exit status."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    if isinstance(error, BrokenPipeError):
        return 128 + _SIGPIPE  # the reader has gone: there is nobody left to tell
    say_error(f"standard output: {error.strerror}")
    return HOST_ERROR_STATUS


def show_traceback(args: list[str]) -> None:
    """Print the traceback of the present error, if ``args`` have -vv."""
    if "-vv" in args or args.count("-v") + args.count("--verbose") > 1:
        import traceback

        for part in traceback.format_exception(*sys.exc_info()):
            # A frame has two lines; an error's text is one line, whatever is in it.
            complain(*(part.splitlines() if part.startswith("  ") else [part.strip("\n")]))


def complain(*lines: str) -> None:
    """Print lines on standard error, if there is one."""
    from pyvmm import report

    for line in lines:
        report.complain(line)


def say_error(line: str) -> None:
    """Print one line on standard error, if there is one."""
    from pyvmm.report import say

    say(line)
