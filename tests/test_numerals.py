"""Numbers in texts: every option and every file that has some, with those that nobody means."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pyvmm.cli import lab
from pyvmm.cli.parse import parse_disk, parse_size
from pyvmm.cli.run import COMMAND, config_from
from pyvmm.config import DiskConfig
from pyvmm.errors import ConfigError
from pyvmm.lab import lab_environment
from pyvmm.linux.guest import Boot, describe
from pyvmm.linux.options import KernelConfig
from pyvmm.linux.requirements import problems
from pyvmm.numerals import decimal_number, whole_number
from pyvmm.startup.options import parse_options
from pyvmm.storage.fault_script import MAX_DELAY_S, MAX_FAULTS, parse_script
from pyvmm.storage.nbd_uri import parse_nbd_uri
from pyvmm.virtio.rate_limit import MAX_RATE, RateLimit
from pyvmm.x86.cpu_template import read_template

NEVER = (
    "\u0663", "1\u0663", "\u00b2", "\uff11", "1_0", "0x10", "0b1", "0o7", "inf", "-inf", "nan",
    "Infinity", "1e999", "-1", "--1", "1,5", "9" * 5000, "9" * 39, "1" + "0" * 400 + "K", "1.5.5",
    "1 0", "\x001", "true", "1e", "e1", "99999999999999999999", "+1", ".", "1iBB",
)
"""What no option means: other digits, other notations, no number, too large for anything."""


def run_option(name: str) -> Callable[[str, Path], object]:
    def parse(text: str, _folder: Path) -> object:
        return config_from(parse_options(COMMAND, ["--kernel", "k", f"{name}={text}"]))
    return parse


def lab_option(name: str) -> Callable[[str, Path], object]:
    def parse(text: str, _folder: Path) -> object:
        return lab.config_from(parse_options(lab.COMMAND, [f"{name}={text}", "--", "true"]))
    return parse


def disk_option(form: str) -> Callable[[str, Path], object]:
    def parse(text: str, _folder: Path) -> object:
        return parse_disk(f"d,{form.format(text.replace(',', ',,'))}")
    return parse


def fault(form: str) -> Callable[[str, Path], object]:
    return lambda text, _folder: parse_script(form.format(text), "faults")


def template(member: str) -> Callable[[str, Path], object]:
    def parse(text: str, folder: Path) -> object:
        entry = {"leaf": 1, "subleaf": 0, "modifiers": [{"register": "eax", "bitmap": "0bx"}]}
        path = folder / "t.json"
        whole = {"cpuid_modifiers": [entry | {member: "@"}]}
        if member == "bitmap":
            whole = {"cpuid_modifiers": [
                entry | {"modifiers": [{"register": "eax", "bitmap": "@"}]}
            ]}
        path.write_text(json.dumps(whole).replace('"@"', json.dumps(text)))
        return read_template(str(path))
    return parse


def nbd(text: str, _folder: Path) -> object:
    return parse_nbd_uri(f"nbd://host:{text}/x")


OPTIONS: dict[str, Callable[[str, Path], object]] = {
    **{f"run {name}": run_option(name) for name in ("--memory", "--cpus", "--timeout")},
    **{f"lab {name}": lab_option(name) for name in ("--memory", "--cpus", "--timeout")},
    **{form: disk_option(form) for form in
       ("queues={}", "iops={}", "iops=1:{}", "bps={}", "bps=1:{}")},
    **{form: fault(form) for form in (
        "read {}: EIO", "read 1-{}: EIO", "read {}+: EIO", "read * sectors {}: EIO",
        "read * sectors 0-{}: EIO", "write 1: torn {}", "read 1: short {}", "any *: delay {}",
    )},
    **{f"template {name}": template(name) for name in ("leaf", "subleaf", "bitmap")},
    "nbd port": nbd,
}
_MEANT = {  # what is a number there after all
    ("template leaf", "0x10"), ("template subleaf", "0x10"), ("template bitmap", "0b1"),
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("text", NEVER, ids=lambda text: ascii(text[:12]))
def test_fault_8_a_number_that_nobody_means_is_refused_where_it_is_read(
    name: str, text: str, tmp_path: Path
) -> None:
    if (name, text) in _MEANT:
        OPTIONS[name](text, tmp_path)
        return
    with pytest.raises(ConfigError) as caught:
        OPTIONS[name](text, tmp_path)
    assert "\n" not in str(caught.value)
    assert len(caught.value.problem) < 400


@settings(max_examples=400, deadline=None, suppress_health_check=[
    HealthCheck.function_scoped_fixture,  # one file that every example overwrites
])
@given(
    name=st.sampled_from(sorted(OPTIONS)),
    text=st.text(max_size=30) | st.integers().map(str) | st.floats().map(str)
    | st.integers(0, 10**30).map(str) | st.sampled_from(["0", "1", "00", "1.", ".5", "1e-320"]),
)
def test_fault_8_any_text_is_a_number_or_refused(name: str, text: str, tmp_path: Path) -> None:
    with contextlib.suppress(ConfigError):
        OPTIONS[name](text, tmp_path)


@pytest.mark.parametrize("name", [
    *(name for name in OPTIONS if name.startswith(("run", "lab", "queues", "iops", "bps", "nbd"))),
])
@pytest.mark.parametrize("text", [
    " 2", "2 ", "\t2", "2\n", "", "2\xa0", "2k\u0131b", "2bib", "2ib", "2kk",
])
def test_fault_8_nothing_stands_around_a_number(name: str, text: str, tmp_path: Path) -> None:
    if name == "nbd port" and not text:  # nbd://host:/ is what RFC 3986 allows, with the usual port
        return
    with pytest.raises(ConfigError):
        OPTIONS[name](text, tmp_path)


@pytest.mark.parametrize(("text", "number"), [
    ("2", 2), ("2.5", 2.5), (".5", 0.5), ("2.", 2), ("1e3", 1000), ("5e-1", 0.5), ("1E+2", 100),
])
def test_fault_8_how_seconds_may_be_written(text: str, number: float, tmp_path: Path) -> None:
    assert decimal_number(text, 0, 3600) == number
    for name in ("run --timeout", "lab --timeout"):
        OPTIONS[name](text, tmp_path)


@pytest.mark.parametrize("text", [
    "2097152K", "2097152kib", "2048M", "2048mb", "2048MiB", "2G", "2GB", "2gib", "2147483648",
    "2147483648B",
])
def test_how_sizes_may_be_written(text: str) -> None:
    assert parse_size("--memory", text) == 2 << 30


@pytest.mark.parametrize(("script", "limit"), [
    ("any *: delay 99999999999999999999", f"over the limit of {MAX_DELAY_S} seconds"),
    ("any *: delay 3600.1", f"over the limit of {MAX_DELAY_S} seconds"),
    (f"read {10**15 + 1}: EIO", f"over the limit of {10**15}"),
    ("read * sectors 0-99999999999999999999: EIO", "over the limit of"),
    ("write 1: torn 99999999999999999999", "over the limit of"),
    ("any *: EIO\n" * (MAX_FAULTS + 1), f"at most {MAX_FAULTS} faults"),
])
def test_fault_8_a_script_is_told_the_limit(script: str, limit: str) -> None:
    with pytest.raises(ConfigError, match=limit):
        parse_script(script, "faults")
    (delay,) = parse_script(f"any *: delay {MAX_DELAY_S}", "faults")
    assert delay.delay_s == MAX_DELAY_S
    assert len(parse_script("any *: EIO\n" * MAX_FAULTS, "faults")) == MAX_FAULTS


def test_fault_8_a_rate_has_a_limit_however_it_is_given() -> None:
    config = parse_disk("d,iops=1024T:1024T,bps=1024T")
    assert isinstance(config, DiskConfig)
    assert config.rate_limit.ops_per_s == MAX_RATE
    for text in ("iops=1025T", "bps=1:1025T"):
        with pytest.raises(ConfigError, match=r"the most is .*1024T"):
            parse_disk(f"d,{text}")
    with pytest.raises(ConfigError, match="the most is"):
        RateLimit(ops_per_s=MAX_RATE + 1)


@pytest.mark.parametrize("text", NEVER, ids=lambda text: ascii(text[:12]))
def test_fault_8_what_only_the_guest_reads_is_skipped(text: str) -> None:
    """Numbers on the kernel's command line, in its configuration, in git's environment."""
    line = f"root=/dev/vda{text} maxcpus={text} nr_cpus={text} possible_cpus={text}"
    guest = describe(Boot(command_line=line.replace("\0", ""), cpus=2), None)
    assert guest.cpus in (1, 2)
    config = KernelConfig({"NR_CPUS": text, "SMP": "y"}, "here")
    assert not [problem for problem in problems(config, guest) if problem.option == "NR_CPUS"
                and problem.state != text]
    environment = lab_environment({b"GIT_CONFIG_COUNT": text.replace("\0", "").encode()})
    assert environment[b"GIT_CONFIG_COUNT"] in (b"1", b"2")


@given(st.text(max_size=50))
def test_whole_numbers_are_ascii_digits(text: str) -> None:
    number = whole_number(text, 0, 10**50)
    is_meant = 0 < len(text) <= 40 and set(text) <= set("0123456789")
    assert (number is not None) == is_meant
    if number is not None:
        assert number == int(text)


@given(st.floats(allow_nan=False, allow_infinity=False) | st.integers())
def test_decimal_numbers_are_those_of_python(number: float) -> None:
    text = str(number)
    is_meant = len(text) <= 40 and not text.startswith("-")
    assert decimal_number(text, -math.inf, math.inf) == (float(text) if is_meant else None)
    assert decimal_number(f"+{text}", -math.inf, math.inf) is None
    assert decimal_number(text, 0, 1) in ({None} if not 0 <= float(text) <= 1 else
                                          {float(text) if is_meant else None})


def test_ranges_include_their_ends() -> None:
    assert [whole_number(str(n), 2, 4) for n in range(1, 6)] == [None, 2, 3, 4, None]
    assert [decimal_number(text, 0, 1) for text in ("-0.1", "0", "1", "1.1")] == [None, 0, 1, None]
