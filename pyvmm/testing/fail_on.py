"""The lines of the console that fail a test: Linux's own complaints, by class, and a user's.

The texts are those of Linux 4.19 to 6.12; each has the file that prints it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from pyvmm.errors import ConfigError
from pyvmm.startup.types import Record
from pyvmm.testing.verdicts import (
    BootError,
    FailedOn,
    KernelOops,
    KernelPanic,
    KernelWarning,
    Lockup,
    RootNotMounted,
)

PATTERNS: dict[str, tuple[str, ...]] = {
    # The first class that matches counts: a lockup says "BUG:" too.
    "root": (
        r"VFS: Cannot open root device ",  # init/do_mounts.c
        r"Kernel panic - not syncing: VFS: Unable to mount root fs",
    ),
    "panic": (
        r"Kernel panic - not syncing",  # kernel/panic.c
        r"(?:traps: )?PANIC: ",  # arch/x86/kernel/traps.c, arch/x86/mm/extable.c
        r"---\[ end Kernel panic",  # the first line may be torn
    ),
    "lockup": (
        r"(?:NMI )?(?:watchdog: )?BUG: soft lockup",  # kernel/watchdog.c
        r"(?:NMI )?(?:watchdog: )?(?:CPU\d+: )?Watchdog detected hard LOCKUP",
        r"(?:rcu: )?INFO: \S+ (?:self-)?detected (?:expedited )?stalls?",  # kernel/rcu/tree_stall.h
        r"INFO: task .{1,80} blocked for more than \d+ seconds",  # kernel/hung_task.c
        r"BUG: workqueue lockup",  # kernel/workqueue.c
    ),
    "oops": (
        r"BUG: ",  # arch/x86/mm/fault.c, mm/kasan, mm/kfence, kernel/sched/core.c ...
        r"[Kk]ernel BUG at ",  # lib/bug.c
        r".{1,200}: [0-9a-f]{4} \[#\d+\]",  # __die(): "Oops: 0002 [#1] PREEMPT SMP"
        r"UBSAN: ",  # lib/ubsan.c
        r"KASAN: ",  # mm/kasan/report.c, behind a general protection fault
    ),
    "warning": (
        r"WARNING: ",  # kernel/panic.c, kernel/locking/lockdep.c, kernel/rcu
        r"INFO: trying to register non-static key",  # kernel/locking/lockdep.c
    ),
}
"""Regular expressions by class.  A message of printk fails a test if one matches at its start."""

BOOT_PATTERNS: tuple[str, ...] = (
    r"pyvmm-initramfs: cannot mount the root",  # linux/stock_init.sh
    r"ALERT!  .{1,200} does not exist\.  Dropping to a shell!",  # Debian's initramfs-tools
)
"""The same for lines of an initramfs, class "root": only until user space is known to run."""

CLASSES = tuple(PATTERNS)
FATAL = ("root", "panic")
"""Classes after which no guest goes on, so they cannot be switched off."""
ERRORS: dict[str, type[BootError]] = {
    "root": RootNotMounted, "panic": KernelPanic, "lockup": Lockup, "oops": KernelOops,
    "warning": KernelWarning,
}
ALL = "all"


class FailOn(Record):
    """The lines that fail a test.

    ``classes`` are the classes of PATTERNS that count.  ``patterns`` are a user's own regular
    expressions, searched in every line, a program's too.  A line in which one of ``allowed`` is
    found fails nothing, unless its class is FATAL.  ConfigError for an unknown class and for a
    pattern that is none.
    """

    classes: tuple[str, ...] = CLASSES
    patterns: tuple[str, ...] = ()
    allowed: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in self.classes:
            check_class("fail_on", name)
        for pattern in self.patterns:
            check_pattern("fail_on", pattern)
        for pattern in self.allowed:
            check_pattern("allow", pattern)
        if missing := [name for name in FATAL if name not in self.classes]:
            raise ConfigError(
                f"fail_on without {missing[0]}", "cannot be: no guest goes on after it"
            )

    def without(self, *classes: str) -> FailOn:
        """Return the same without ``classes``; "all" leaves only those that are FATAL."""
        return FailOn.parse(start=self, without=classes)

    def also(self, *patterns: str) -> FailOn:
        """Return the same with a user's ``patterns``."""
        return FailOn.parse(start=self, add=patterns)

    def allowing(self, *patterns: str) -> FailOn:
        """Return the same with further ``patterns`` of lines that fail nothing."""
        return FailOn.parse(start=self, allow=patterns)

    @classmethod
    def parse(
        cls,
        *,
        start: FailOn | None = None,
        add: Iterable[str] = (),
        without: Iterable[str] = (),
        allow: Iterable[str] = (),
        names: tuple[str, str, str] = ("fail_on", "without", "allow"),
    ) -> FailOn:
        """Return ``start`` (all classes) changed by the texts of options, called ``names``."""
        start = start if start is not None else FAIL_ON
        add, without, allow = tuple(add), tuple(without), tuple(allow)
        for option, patterns in ((names[0], add), (names[2], allow)):
            for pattern in patterns:
                check_pattern(option, pattern)
        for name in without:
            if name != ALL:
                check_class(names[1], name)
            if name in FATAL:
                raise ConfigError(f"{names[1]} {name}", "cannot be: no guest goes on after it")
        gone = CLASSES if ALL in without else without
        return cls(
            classes=tuple(c for c in start.classes if c in FATAL or c not in gone),
            patterns=(*start.patterns, *add),
            allowed=(*start.allowed, *allow),
        )


def check_class(option: str, name: str) -> None:
    """Raise ConfigError that calls it ``option`` unless ``name`` is one of CLASSES."""
    if name not in CLASSES:
        raise ConfigError(f"{option} {name}", f"is no class; there are {', '.join(CLASSES)}")


def check_pattern(option: str, pattern: str) -> None:
    """Raise ConfigError that calls it ``option`` unless ``pattern`` is a regular expression."""
    if not pattern:
        raise ConfigError(f"{option} ''", "matches every line; write a regular expression")
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ConfigError(
            f"{option} {pattern!r}", f"is no regular expression: {error}"
        ) from None


FAIL_ON = FailOn()
"""The default: every class."""


class Classifier:
    """Tells the class of a line, by a FailOn."""

    def __init__(self, fail_on: FailOn) -> None:
        self._classes = [
            (name, re.compile("|".join(PATTERNS[name])))
            for name in PATTERNS if name in fail_on.classes
        ]
        self._users = [re.compile(pattern) for pattern in fail_on.patterns]
        self._allowed = [re.compile(pattern) for pattern in fail_on.allowed]
        self._boot = re.compile("|".join(BOOT_PATTERNS))

    def class_of(
        self, messages: Sequence[str], line: str = "", *, is_booting: bool = False
    ) -> tuple[str, str]:
        """Return the class and the user's pattern that matched; ("", "") for a harmless line.

        ``messages`` are what may be printk's on ``line``.  The class of a user's pattern is
        "fail-on".
        """
        is_allowed = any(pattern.search(line) for pattern in self._allowed)
        for name, pattern in self._classes:
            if (name in FATAL or not is_allowed) and any(map(pattern.match, messages)):
                return name, ""
        if is_booting and self._boot.match(line):
            return "root", ""
        if not is_allowed:
            for pattern in self._users:
                if pattern.search(line):
                    return FailedOn.name, pattern.pattern
        return "", ""
