"""Files for --cpu: what is understood, and one line for everything that is not."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pyvmm.errors import ConfigError
from pyvmm.x86.cpu_mask import RegisterMask
from pyvmm.x86.cpu_model import parse_cpu_option
from pyvmm.x86.cpu_template import MAX_BYTES

LEAF_OF = '{"cpuid_modifiers": [{"leaf": %s, "modifiers": []}]}'
Parse = Callable[[str | bytes | object], tuple[RegisterMask, ...]]
ALL = 0xFFFF_FFFF
MODIFIER = {"register": "ebx", "bitmap": "0b0"}


def leaf(**changes: object) -> object:
    """A template of one leaf, with fields changed, or left out where they are None."""
    fields = {"leaf": "0x7", "subleaf": "0x0", "modifiers": [MODIFIER], **changes}
    return {"cpuid_modifiers": [{k: v for k, v in fields.items() if v is not None}]}


def modifier(**changes: object) -> object:
    return leaf(modifiers=[{**MODIFIER, **changes}])


@pytest.fixture
def parse(tmp_path: Path) -> Parse:
    """The masks of a file with this content; what is not text is written as JSON."""

    def masks(content: str | bytes | object) -> tuple[RegisterMask, ...]:
        text = content if isinstance(content, str | bytes) else json.dumps(content)
        path = tmp_path / "cpu.json"
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return parse_cpu_option(str(path)).masks

    return masks


def test_the_digits_of_a_bitmap(parse: Parse) -> None:
    template = leaf(leaf="0x80000008", modifiers=[
        {"register": "ebx", "bitmap": "0b10x_x01"},
        {"register": "edx", "bitmap": "0b" + "1" * 32},
        {"register": "eax", "bitmap": "0bx"},
    ])
    assert parse(template) == (
        RegisterMask(word=(0x8000_0008, 0, "ebx"), keep=ALL & ~0b010010, demand=0b100001),
        RegisterMask(word=(0x8000_0008, 0, "edx"), keep=ALL, demand=ALL),
        RegisterMask(word=(0x8000_0008, 0, "eax"), keep=ALL, demand=0),
    )


@pytest.mark.parametrize("number", ["0x7", "0x00000007", 7])
def test_a_leaf_is_a_number_or_a_hexadecimal_string(parse: Parse, number: object) -> None:
    assert parse(leaf(leaf=number))[0].word == (7, 0, "ebx")


def test_a_subleaf_may_be_left_out_and_nothing_need_be_masked(parse: Parse) -> None:
    assert parse(leaf(subleaf=None))[0].word == (7, 0, "ebx")
    assert parse(leaf(leaf="0xd", subleaf="0x1"))[0].word == (0xD, 1, "ebx")
    assert parse({"cpuid_modifiers": []}) == ()


@pytest.mark.parametrize(("template", "problem"), [
    ("", "is not JSON: Expecting value, line 1 column 1"),
    ("{", "is not JSON"),
    (b"\xff{}", "is not UTF-8 at byte 0"),
    ("[" * 100_000, "nests so deep"),
    ('{"cpuid_modifiers": ' + "9" * 10_000 + "}", rf"cpuid_modifiers: is {'9' * 40}\.\.\., not a"),
    ("9" * 10_000, rf"the file: is {'9' * 40}\.\.\., not an object"),
    (LEAF_OF % ("9" * 10_000), rf"\[0\].leaf: {'9' * 40}\.\.\. is not a number of 32 bits"),
    (LEAF_OF % ("-" + "9" * 10_000), rf"\[0\].leaf: -{'9' * 39}\.\.\. is not a number of 32 bits"),
    (LEAF_OF % ("9" * 10_000 + "e9"), r"\[0\].leaf: .* is neither a number nor text"),
    (LEAF_OF % ("9" * 10_000 + ".5"), r"\[0\].leaf: .* is neither a number nor text"),
    (LEAF_OF % f'"0x{"f" * 10_000}"', r"\[0\].leaf: .* is not a number of 32 bits"),
    ([], r"the file: is \[\], not an object with cpuid_modifiers"),
    (7, "the file: is 7, not an object"),
    ({}, "the file: has no field 'cpuid_modifiers'"),
    ({"cpuid_modifiers": [], "msr_modifiers": []}, 'the file: unknown field "msr_modifiers"'),
    ({"cpuid_modifiers": {}}, r"cpuid_modifiers: is \{\}, not a list"),
    ({"cpuid_modifiers": ["0x7"]}, r'cpuid_modifiers\[0\]: is "0x7", not an object'),
    ('{"cpuid_modifiers": [], "cpuid_modifiers": []}', "field .* is given twice in one object"),
    (leaf(leaf=None), "has no field 'leaf'"),
    (leaf(modifiers=None), "has no field 'modifiers'"),
    (leaf(flags=1), r'cpuid_modifiers\[0\]: unknown field "flags"; the fields are leaf, '),
    (leaf(leaf="seven"), r'\[0\].leaf: "seven" is neither a number nor text like'),
    (leaf(leaf="7"), "is neither a number"),
    (leaf(leaf=True), r"\[0\].leaf: true is neither"),
    (leaf(leaf=7.0), r"\[0\].leaf: 7.0 is neither"),
    (leaf(leaf=float("nan")), "NaN is neither"),
    (leaf(leaf="0x100000000"), r"\[0\].leaf: .* is not a number of 32 bits"),
    (leaf(leaf=-1), r"\[0\].leaf: -1 is not a number of 32 bits"),
    (leaf(subleaf=1 << 32), r"\[0\].subleaf: 4294967296 is not a number of 32 bits"),
    (leaf(subleaf=[]), r"\[0\].subleaf: \[\] is neither"),
    (leaf(modifiers="ebx"), r'\[0\].modifiers: is "ebx", not a list'),
    (leaf(modifiers=[1]), r"\[0\].modifiers\[0\]: is 1, not an object with register, bitmap"),
    (leaf(modifiers=[MODIFIER, MODIFIER]), "register ebx is given twice"),
    (modifier(register="rbx"), r'modifiers\[0\].register: "rbx" is none of eax, ebx, ecx, edx'),
    (modifier(register=["ebx"]), "register: .* is none of"),
    (modifier(bitmap="01x"), 'bitmap: "01x" is not 0b and then digits'),
    (modifier(bitmap="0b012"), "is not 0b and then digits"),
    (modifier(bitmap=1), "bitmap: 1 is not 0b"),
    (modifier(bitmap="0b"), "is not 0b"),
    (modifier(bitmap="0b_"), "has 0 digits"),
    (modifier(bitmap="0b" + "x" * 33), "has 33 digits; a register has 32 bits"),
    (modifier(mask="0x1"), 'unknown field "mask"'),
    (modifier(**{"a\nb" * 50: 1}), r"unknown field .a\\nba\\nb"),
    ({"cpuid_modifiers": [{"leaf": "0x7", "modifiers": []}, {"leaf": 7, "modifiers": []}]},
     r"\[1\]: leaf 0x7 subleaf 0x0 is given twice"),
    (leaf(leaf="0xb"), "leaf 0xb describes the topology, which is the guest's own"),
    (leaf(leaf="0x1f"), "describes the topology"),
    (leaf(leaf="0x8000001e"), "describes the topology"),
    (leaf(leaf="0xd"), "leaf 0xd describes the extended state"),
    (leaf(leaf="0x40000000"), "is by which the guest knows KVM"),
    (" " * (MAX_BYTES + 1), "is larger than 1 MiB"),
])  # fmt: skip
def test_what_is_wrong_is_said_in_one_line(
    parse: Parse, tmp_path: Path, template: object, problem: str
) -> None:
    with pytest.raises(ConfigError, match=problem) as caught:
        parse(template)
    message = str(caught.value)
    assert message.startswith(f"--cpu {tmp_path / 'cpu.json'}: ")
    assert "\n" not in message
    assert len(message) < len(str(tmp_path)) + 200


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent.json: No such file or directory"):
        parse_cpu_option(str(tmp_path / "absent.json"))
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(ConfigError, match=r"folder.json: Is a directory|is not a regular file"):
        parse_cpu_option(str(tmp_path / "folder.json"))
    os.mkfifo(tmp_path / "fifo.json")
    with pytest.raises(ConfigError, match=r"fifo.json: is not a regular file"):
        parse_cpu_option(str(tmp_path / "fifo.json"))


def test_a_comma_in_the_name_is_written_twice(tmp_path: Path) -> None:
    (tmp_path / "a,b.json").write_text('{"cpuid_modifiers": []}')
    model = parse_cpu_option(f"{tmp_path}/a,,b.json,-avx")
    assert (model.name, model.removed) == (f"{tmp_path}/a,b.json", frozenset({"avx"}))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text()
    | st.sampled_from(["0x7", "ebx", "0b1x0"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["cpuid_modifiers", "leaf", "subleaf", "modifiers", "register", "bitmap"])
        | st.text(), inner, max_size=4,
    ),
    max_leaves=20,
)  # fmt: skip
LEAF = st.fixed_dictionaries({"leaf": JSON | st.integers(0, 8), "modifiers": JSON | st.lists(
    st.fixed_dictionaries({
        "register": st.sampled_from(["eax", "ebx"]) | JSON,
        "bitmap": st.from_regex(r"0b[01x]{0,34}", fullmatch=True) | JSON,
    }), max_size=3,
)})


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=80) | JSON
       | st.fixed_dictionaries({"cpuid_modifiers": st.lists(LEAF, max_size=3)}))
def test_any_file_is_understood_or_refused_in_one_line(parse: Parse, content: object) -> None:
    masks: tuple[RegisterMask, ...] = ()
    refusal = ""
    try:
        masks = parse(content)
    except ConfigError as error:
        refusal = str(error)
    assert "\n" not in refusal
    for mask in masks:
        assert 0 <= mask.keep <= ALL
        assert mask.demand & ~mask.keep == 0
