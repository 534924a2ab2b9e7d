"""Take the evidence of a verdict back from a saved state (docs/architecture.md, "State")."""

from __future__ import annotations

from pyvmm.startup.types import TYPE_CHECKING
from pyvmm.state import Fields

if TYPE_CHECKING:
    from pyvmm.run.verdict import Evidence

_SIGNS = ("has_printed", "waits_for_root", "reached_init", "is_panic_reported")
_TEXTS = ("panic", "mount_error", "gave_up")
MAX_TEXT = 1 << 16
"""The longest line of evidence that a state may have, in characters."""


def restore_evidence(evidence: Evidence, data: object) -> None:
    """Set the fields of ``evidence`` to ``data`` from ``Verdict.save``; StateError."""
    fields = Fields("verdict", data)
    signs = {name: fields.boolean(name) for name in _SIGNS}
    texts = {name: fields.optional_text(name, MAX_TEXT) for name in _TEXTS}
    fields.end()
    texts["mount_error"] = texts["mount_error"] or ""
    for name, value in (signs | texts).items():
        setattr(evidence, name, value)
    if not evidence.reached_init:
        evidence.user_space_seen_s = None
