"""Turn a mistake in a command line into one line: the word, the fault and the likely meaning.

Imported only when there is a mistake.
"""

from __future__ import annotations

import difflib
import shlex
from collections.abc import Iterable, Iterator, Sequence
from types import MappingProxyType

from pyvmm.errors import ConfigError
from pyvmm.startup.commands import Command, Mistake, Option, looks_like_option

OTHER_NAMES = MappingProxyType({
    "-k": "--kernel", "-m": "--memory", "--mem": "--memory", "--ram": "--memory", "-smp": "--cpus",
    "--smp": "--cpus", "--vcpus": "--cpus", "-hda": "--disk", "-drive": "--disk",
    "--drive": "--disk", "--image": "--disk", "--root": "--disk", "--rootfs": "--disk",
    "--initramfs": "--initrd", "--args": "--append", "--bios": "--kernel",
})
"""Options as other hypervisors call them, and their names here."""
OTHER_DISK_NAMES = MappingProxyType({
    "readonly": "ro", "read-only": "ro", "read_only": "ro", "rdonly": "ro",
})
"""Options of ``--disk`` as other hypervisors call them, and their names here."""
OTHER_CONSOLES = MappingProxyType({
    "-": "stdio", "stdout": "stdio", "tty": "stdio", "terminal": "stdio", "null": "none",
    "off": "none", "no": "none",
})
"""Consoles as other programs call them, and their names here."""
_TEXTS = ("--append", "--cmdline")
"""Options whose values often have spaces, which a shell splits unless they are quoted."""


def explain(command: Command, argv: Sequence[str], mistake: Mistake) -> ConfigError:
    """Return the error that explains ``mistake``, which was found in ``argv``."""
    subject, problem = _said(command, argv, mistake)
    return ConfigError(subject, f"{problem} (pyvmm {command.name} --help)")


def nearest(word: str, names: Iterable[str]) -> list[str]:
    """Return the names among ``names`` that ``word`` may mean: the name most like it, and a name
    that it begins."""
    known = list(names)
    alike = difflib.get_close_matches(word.lower().replace("_", "-"), known, 1)
    begun = [name for name in known if len(word.strip("-")) > 1 and name.startswith(word)]
    return list(dict.fromkeys([*alike, *begun[:1]]))


def did_you_mean(word: str, names: Iterable[str]) -> str:
    """Return ``; did you mean NAME?``, or nothing if none of ``names`` is like ``word``."""
    found = nearest(word, names)
    return f"; did you mean {' or '.join(found)}?" if found else ""


def disk_option_meant(part: str, flags: Sequence[str], values: Sequence[str]) -> str:
    """Return a remark on ``part``, which is no option of ``--disk``; "" if none is like it."""
    name, has_value, _ = part.partition("=")
    if has_value and name in flags:
        return f" ({name} takes no value)"
    names = (*flags, *values)
    likely = OTHER_DISK_NAMES.get(name) or next(iter(nearest(name, names)), name)
    return f" ({likely}?)" if likely != name else ""


def console_meant(name: str) -> str:
    """Return the console that ``name``, a file that is not there, may be meant for; else ""."""
    found = difflib.get_close_matches(name.lower(), ("stdio", "none"), 1, 0.75)
    return OTHER_CONSOLES.get(name.lower()) or next(iter(found), "")


def _said(command: Command, argv: Sequence[str], mistake: Mistake) -> tuple[str, str]:
    """Return the subject and the problem of the error."""
    option, word = mistake.option, argv[mistake.at] if mistake.at < len(argv) else ""
    if command.verbs:
        return _no_verb(command, argv)
    match mistake.kind, option:
        case "unknown", _:
            return _unknown(command, word)
        case "no value", Option():
            dashed = "" if mistake.at + 1 == len(argv) else (
                f"; one that begins with a dash is written {option.name}=VALUE"
            )
            return option.name, f"needs a value: {option.name} {option.metavar}{dashed}"
        case "flag with a value", Option():
            name = word.partition("=")[0]
            return name, f"takes no value; write {name} alone"
        case "twice", Option():
            return option.name, f"is given twice; {option.twice or 'give it once'}"
        case "missing", Option():
            return option.name, f"is missing; write {option.name} {option.metavar}"
        case "no word", _:
            words = " ".join(word.metavar for word in command.words)
            return command.name, f"needs {words}"
    return _too_many(command, argv, mistake.at)


def _unknown(command: Command, word: str) -> tuple[str, str]:
    name = word.partition("=")[0]
    names = [option.name for option in command.options]
    names += [option.short for option in command.options if option.short]
    if (known := OTHER_NAMES.get(name, "")) in names:
        return name, f"is no option of pyvmm {command.name}; did you mean {known}?"
    # -kernel, as QEMU has it, is --kernel.
    hint = did_you_mean(name, names) or did_you_mean(f"-{name}", names)
    return name, f"is no option of pyvmm {command.name}{hint}"


def _no_verb(command: Command, argv: Sequence[str]) -> tuple[str, str]:
    verbs = [verb.verb for verb in command.verbs]
    if not argv:
        return command.name, f"needs {_listed(verbs, 'or')}"
    return argv[0], (
        f"is not known to pyvmm {command.name}, which has {_listed(verbs, 'and')}"
        f"{did_you_mean(argv[0], verbs)}"
    )


def _listed(words: Sequence[str], last: str) -> str:
    """Return ``words`` as "a, b LAST c"."""
    return f" {last} ".join(filter(None, (", ".join(words[:-1]), *words[-1:])))


def _too_many(command: Command, argv: Sequence[str], at: int) -> tuple[str, str]:
    """Explain a word too many: part of a text without quotes, or a value without its option."""
    names = {option.name: option for option in command.options}
    if at > 1 and argv[at - 2] in _TEXTS and argv[at - 2] in names:
        text = shlex.quote(" ".join(_text_from(argv, at - 1, names)))
        return argv[at], f"is outside the quotes; write {argv[at - 2]} {text}"
    meant = " ".join(_meant(command, argv, at))
    problem = "is one word too many"
    return argv[at], f"{problem}; write {meant}" if meant else problem


def _text_from(argv: Sequence[str], at: int, names: dict[str, Option]) -> Iterator[str]:
    """Yield the words of a text that begins at ``at``."""
    for word in argv[at:]:
        if looks_like_option(word, names):
            return
        yield word


def _meant(command: Command, argv: Sequence[str], at: int) -> Iterator[str]:
    """Yield the words from ``at`` on, each behind the option for which it may be meant."""
    options = {option.name: option for option in command.options}
    free = [
        name for name in command.meant
        if options[name].many or not any(word.partition("=")[0] == name for word in argv)
    ]
    is_value = False
    for word in argv[at:]:
        name = word.partition("=")[0]
        if looks_like_option(word, options):
            is_value = name in options and bool(options[name].metavar) and name == word
        elif is_value or not free:
            is_value = False
        else:
            yield f"{free[0]} {shlex.quote(word)}"
            if not options[free[0]].many:
                free.pop(0)
