"""The plugin in the controller of pytest-xdist: its workers tell it when they need the lab."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from pyvmm.pytest_plugin.lab import Note


class Controller:
    """Hooks of pytest-xdist, registered only if it distributes the tests of this session.

    ``go_to_lab`` is called with the reason to go there.
    """

    def __init__(self, config: pytest.Config, go_to_lab: Callable[[str], None]) -> None:
        self._config = config
        self._go_to_lab = go_to_lab
        self._note: Note | None = None

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:
        """Tell a worker on this host where to write that it needs the lab."""
        from pyvmm.pytest_plugin.lab import Note

        if self._note is None:
            self._note = Note()
        if node.gateway.spec.popen:
            node.workerinput["pyvmm_note"] = self._note.path

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, node: Any, ids: Sequence[str]) -> None:
        """Go to the lab if the worker that has collected its tests says so; no test has begun."""
        reason = self._note.read() if self._note is not None else ""
        if not reason:
            return
        distributed = self._config.pluginmanager.getplugin("dsession")
        with contextlib.suppress(Exception):  # they end anyway, when nobody reads them any more
            distributed.nodemanager.teardown_nodes()
        self._go_to_lab(reason)

    def pytest_unconfigure(self) -> None:
        """Close the note."""
        if self._note is not None:
            self._note.close()
