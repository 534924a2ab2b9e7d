"""The two ways in which a part or a trial says that it did not go well."""

from __future__ import annotations


class TrialError(Exception):
    """A trial has found something that must not be; the text says it."""


class PartError(Exception):
    """A part cannot be done here and now, whatever its trials would say; it is not a failure."""
