"""Run the same tests on clones and on boots; print the seconds of each.

    python3 seconds.py [TESTS]        # 100 of them, unless you say otherwise
"""

from __future__ import annotations

import subprocess
import sys
import time

WAYS = {"a clone each": [], "a boot each": ["--boot-each"]}


def main(tests: int = 100) -> int:
    """Run ``tests`` tests by each way; return 1 if one of them fails."""
    chosen = [f"tests/test_clones.py::test_a_machine_of_its_own[{n}]" for n in range(tests)]
    status = 0
    for way, options in WAYS.items():
        begin_s = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options, *chosen],
            check=False, stdout=subprocess.DEVNULL,
        )
        took_s = time.monotonic() - begin_s
        result = "passed" if done.returncode == 0 else f"FAILED ({done.returncode})"
        print(f"{way:13} {tests} tests {result} {took_s:7.1f} s", flush=True)
        status |= done.returncode != 0
    return status


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:2])))
