"""Calling hooks, which are functions of a script: their answers, and the end of one that raises."""

from __future__ import annotations

import threading
import traceback
from collections.abc import Callable, Sequence

from pyvmm.run.outcome import Kind, Outcome
from pyvmm.startup.types import TYPE_CHECKING

if TYPE_CHECKING:
    from typing import Any

Hook = Callable[..., object]


class Refusal:
    """The type of ``REFUSE``."""

    def __repr__(self) -> str:
        return "pyvmm.REFUSE"


REFUSE = Refusal()
"""A hook's answer: nobody is there.  Reads give all ones, writes vanish, a disk's request fails."""


class BadAnswerError(Exception):
    """A hook returned something that is no answer; the text says what it may return."""


class HookCalls:
    """Calls hooks, in any thread of a run.

    The first hook that raises, or that returns no valid answer, ends the run by ``finish``.  From
    then on no hook is called any more, and every question is answered by REFUSE.
    """

    def __init__(self, finish: Callable[[Outcome], None]) -> None:
        self._finish = finish
        self._has_failed = False

    def begin_anew(self) -> None:
        """Call hooks again: the guest is as it was before the one that raised."""
        self._has_failed = False

    def ask(
        self,
        name: str,
        hooks: Sequence[Hook],
        arguments: tuple[object, ...],
        judge: Callable[[object], Any],
        passes: tuple[type[Exception], ...] = (),
    ) -> Any:
        """Return ``judge(answer)`` of the first of ``hooks`` whose answer is not None; else None.

        ``name`` is the method that installed them.  ``judge`` raises BadAnswerError for answers
        that make no sense.  Exceptions of the types ``passes`` are answers too: they are raised.
        """
        for hook in hooks:
            if self._has_failed:
                return REFUSE
            try:
                answer = hook(*arguments)
                if answer is not None:
                    return judge(answer)
            except passes:
                raise
            except BaseException as error:
                self._fail(name, hook, error)
                # A Ctrl-C of the person at the keyboard arrives in the main thread only.
                is_main = threading.current_thread() is threading.main_thread()
                if is_main and not isinstance(error, Exception):
                    raise
                return REFUSE
        return None

    def _fail(self, name: str, hook: Hook, error: BaseException) -> None:
        self._has_failed = True
        if isinstance(error, BadAnswerError):
            detail = f"the {name} hook {_place(hook)} {error}"
        else:
            # The first place is in this file.
            place = error.__traceback__.tb_next if error.__traceback__ else None
            said = traceback.format_exception_only(type(error), error)[-1].strip()
            detail = f"the {name} hook {_place(hook)} raised {said}"
            if place is not None:
                lines = traceback.format_exception(type(error), error, place)
                detail += f"\n{''.join(lines).rstrip()}"
        self._finish(Outcome(Kind.HOST_ERROR, detail=detail))


def number(answer: object, size: int) -> int | Refusal:
    """Judge the answer to an access of ``size`` bytes: REFUSE, or an int that fits."""
    if isinstance(answer, Refusal):
        return answer
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < 1 << 8 * size:
        return answer
    raise BadAnswerError(
        f"returned {_short(answer)}; for this access it may return None, an int from 0 to "
        f"{(1 << 8 * size) - 1:#x}, or REFUSE"
    )


def check_hook(method: str, hook: object) -> None:
    """Raise TypeError unless ``hook`` can be called."""
    if not callable(hook):
        raise TypeError(f"{method} takes a function to call, not {type(hook).__name__}")


def _short(answer: object) -> str:
    """Return ``answer`` as a message shows it; of what is no number only the type."""
    return f"{answer!r:.40}" if isinstance(answer, int) else f"a {type(answer).__name__}"


def _place(hook: Hook) -> str:
    """Return the name of ``hook``, and the file and line where it is defined if there is one."""
    name = getattr(hook, "__qualname__", None) or f"of type {type(hook).__name__}"
    code = getattr(hook, "__code__", None)
    return f"{name} ({code.co_filename}:{code.co_firstlineno})" if code else str(name)
