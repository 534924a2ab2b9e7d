"""Too few open files: the error that says so, with the remedy."""

from __future__ import annotations

from pyvmm.errors import HostError, PyvmmError

MANY_MACHINES_NEED = 4096
"""Open files for a process with a hundred machines; each has some 20."""
_EMFILE = 24


class EnoughFiles:
    """A context manager for a call of a script's: a lack of open files is a HostError with its
    remedy, whatever it prevented."""

    def __enter__(self) -> None:
        """Begin."""

    def __exit__(self, _kind: object, error: object, _traceback: object) -> None:
        if isinstance(error, (OSError, PyvmmError)):
            refuse_shortage(error, MANY_MACHINES_NEED, "a process with many machines")


def shortage(error: BaseException, needed: int, who: str) -> HostError | None:
    """Return the error to report if too few open files caused ``error``; else None.

    ``who`` needs ``needed`` open files.
    """
    cause: BaseException | None = error
    while cause is not None and getattr(cause, "errno", None) != _EMFILE:
        cause = cause.__cause__ or cause.__context__
    if cause is None:
        return None
    return HostError(too_few(max(needed, descriptor_limit() + 1), who))


def refuse_shortage(error: BaseException, needed: int, who: str) -> None:
    """Raise the error that ``shortage`` returns, if any.

    No local keeps the exception, because its traceback would keep the caller's buffers alive.
    """
    if shortage(error, needed, who) is not None:
        raise HostError(too_few(max(needed, descriptor_limit() + 1), who)) from error


def too_few(needed: int, who: str) -> str:
    """Return the line that says that ``who`` needs more open files than the limit."""
    return (
        f"too few open files: the limit is {descriptor_limit()}, {who} needs {needed}; "
        f"raise it with `ulimit -n {needed}`"
    )


def descriptor_limit() -> int:
    """Return how many files this process may have open."""
    import resource

    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]
