"""A machine that is not in a jail does all that comes after its guest by itself."""

from __future__ import annotations

from pyvmm.attendant.client import LocalAttendant
from pyvmm.attendant.duties import Duties
from pyvmm.startup.bundle import Bundle
from pyvmm.startup.types import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pyvmm.attendant.client import Attendant
    from pyvmm.config import RunConfig
    from pyvmm.machine import Machine
    from pyvmm.run.outcome import Outcome
    from pyvmm.run.verdict import Evidence
    from pyvmm.vhost_user.socket_name import SocketName


def local_attendant(
    config: RunConfig, machine: Machine, bundle: Bundle, *, socket_name: SocketName | None,
    snapshot_path: str | None, any_snapshot: bool, most_scratch_files: int,
) -> Attendant:
    """Return the attendant of ``machine`` in this process; see ``Duties``."""
    kernel, missing = machine.kernel, bundle.left_out()

    def explained(outcome: Outcome, evidence: Evidence) -> Iterable[str]:
        return explain(
            config, outcome, evidence, version=kernel.version, is_linux=kernel.is_linux
        )

    def tidied() -> None:
        if bundle.is_worth_writing(missing):
            from pyvmm.startup.bundle_writing import update  # few starts need it

            update(Bundle(bundle.path), missing)

    return LocalAttendant(Duties(
        explain=explained, tidy=tidied,
        socket_name=socket_name, snapshot_path=snapshot_path, any_snapshot=any_snapshot,
        most_scratch_files=most_scratch_files,
    ))


def explain(
    config: RunConfig, outcome: Outcome, evidence: Evidence, *, version: str, is_linux: bool
) -> list[str]:
    """Return the lines that explain a run which has ended; OSError, ImportError.

    ``version`` is the kernel's own text.
    """
    from pyvmm.cli import explain
    from pyvmm.cli.first_look import has_known_configuration

    return explain.after(
        config, outcome, evidence, is_known=has_known_configuration(config.kernel, version),
        is_linux=is_linux, version=version,
    )
