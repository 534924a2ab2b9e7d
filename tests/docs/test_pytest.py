"""docs/pytest.md: its examples run as they stand; it has every argument, option and fixture."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pyvmm.pytest_plugin.marker import ARGUMENTS
from pyvmm.pytest_plugin.plugin import FIXTURES
from tests.support.guest import IMAGE, KERNEL
from tests.support.patience import patient

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "pytest.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^```python\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)


@pytest.mark.kvm
@pytest.mark.timeout(900)
def test_the_examples(pytester: pytest.Pytester) -> None:
    for number, example in enumerate(EXAMPLES):
        pytester.path.joinpath(f"test_{number}.py").write_text(example)
    done = pytester.runpytest_subprocess(
        "--pyvmm-lab=never", f"--pyvmm-kernel={KERNEL}", f"--pyvmm-disk={IMAGE}",
        timeout=patient(800),
    )
    done.assert_outcomes(passed="".join(EXAMPLES).count("def test_"))


def test_the_page_has_every_argument_and_fixture() -> None:
    assert [name for name in ARGUMENTS if f"`{name}=`" not in TEXT] == []
    assert [name for name in FIXTURES if f"`{name}`" not in TEXT] == []


def test_the_page_has_every_option(pytester: pytest.Pytester) -> None:
    shown = set(re.findall(r"--pyvmm-[\w-]+", pytester.runpytest("--help").stdout.str()))
    assert shown == set(re.findall(r"--pyvmm-[\w-]+", TEXT))
    settings = {option.removeprefix("--").replace("-", "_") for option in shown}
    assert [name for name in settings if f"`{name}`" not in TEXT] == []
