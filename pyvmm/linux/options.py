"""The options with which a kernel was built, wherever read (``config``, ``config_cache``)."""

from __future__ import annotations

from pyvmm.startup.types import TYPE_CHECKING, Record

if TYPE_CHECKING:
    from collections.abc import Mapping


class KernelConfig(Record, kw_only=False):
    """The options that are set, without their ``CONFIG_``, and their ``source``."""

    options: Mapping[str, str]
    source: str

    def state(self, option: str) -> str:
        """``y``, ``m``, another value, or ``n`` for an option that is not set."""
        return self.options.get(option, "n")

    def text(self, option: str) -> str:
        """The value of an option that is a text, without its quotes; "" if it is not set."""
        value = self.options.get(option, "")
        return value[1:-1].replace('\\"', '"') if value[:1] == '"' else ""
