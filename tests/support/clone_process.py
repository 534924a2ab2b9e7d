"""A process as ``pyvmm restore DIR --clones-fd N``: each of its clones is the agent on this host.

DIR decides: ``missing`` is refused as a missing snapshot is, ``dies`` ends each clone at once.
"""

from __future__ import annotations

import os
import socket
import sys

from pyvmm.cli.fork_server import ForkServer
from tests.support import agent_process


def main() -> int:
    """Fork clones until the owner has gone."""
    directory, fd_option = sys.argv[1], sys.argv[-1]
    name = os.path.basename(directory)
    if name == "missing":
        print(f"pyvmm: {directory}: is no snapshot", file=sys.stderr)
        return 125

    def run(words: list[str]) -> int:
        if name == "dies":
            print("pyvmm: it dies", file=sys.stderr, flush=True)
            return 9
        for word in words:
            if word.startswith("--console=/"):
                with open(word.partition("=")[2], "ab") as log:  # noqa: PTH123 - as the real one
                    log.write(" ".join(words[:1]).encode())
        sys.argv[-1] = words[-1]
        agent_process.main()
        return 0

    with socket.socket(fileno=int(fd_option.removeprefix("--clones-fd="))) as owner:
        owner.set_inheritable(False)
        ForkServer(owner, run).serve()
    return 0


if __name__ == "__main__":
    sys.exit(main())
