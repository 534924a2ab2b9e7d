"""``python -m pyvmm``: the same command line as the ``pyvmm`` console script."""

import sys

from pyvmm.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
