"""The agent with the checks of AddressSanitizer and UndefinedBehaviorSanitizer."""

from __future__ import annotations

import subprocess
from pathlib import Path

from guest.agent.build import SOURCES, WARNINGS

FLAGS = ("-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")


def build_checked_agent(folder: Path) -> Path:
    """Compile the agent into ``folder``; an error of memory then ends its process."""
    out = folder / "agent"
    subprocess.run(["gcc", *WARNINGS, *FLAGS, "-o", out, *SOURCES], check=True)
    return out
