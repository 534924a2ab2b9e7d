"""The plugin in the controller of pytest-xdist: its workers tell it when they need the lab."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import pytest

from pyvmm.pytest_plugin.options import Options

if TYPE_CHECKING:
    from pyvmm.pytest_plugin.lab import Note


class Controller:
    """Hooks of pytest-xdist, registered only if it distributes the tests of this session."""

    def __init__(self, config: pytest.Config, options: Options) -> None:
        self._config = config
        self._options = options
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
        from pyvmm.pytest_plugin.plugin import session_of

        distributed = self._config.pluginmanager.getplugin("dsession")
        with contextlib.suppress(Exception):  # they end anyway, when nobody reads them any more
            distributed.nodemanager.teardown_nodes()
        session_of(self._config).go_to_lab(reason)

    def pytest_unconfigure(self) -> None:
        """Close the note."""
        if self._note is not None:
            self._note.close()
