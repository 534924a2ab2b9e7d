"""The default time limit of a boot: longer in the lab, which is slow."""

from __future__ import annotations

import pytest

from pyvmm.launcher.limits import boot_timeout_s


@pytest.mark.parametrize(("lab", "limit_s"), [("", 60), ("1", 300)])
def test_a_boot_may_take_longer_in_the_lab(
    lab: str, limit_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYVMM_LAB", lab)
    assert boot_timeout_s() == limit_s
