"""``python -m tests.support.plain_rings FEATURE,FEATURE... run ...``: pyvmm without some features.

Linux takes every ring feature that is offered, so this is how a guest comes to use the others.
"""

from __future__ import annotations

import functools
import operator
import sys

from pyvmm.cli.main import main
from pyvmm.virtio.block import config
from pyvmm.virtio.spec import Feature

if __name__ == "__main__":
    names, *arguments = sys.argv[1:]
    disabled = functools.reduce(operator.or_, (Feature[name] for name in names.split(",")))
    config.BlockConfig = functools.partial(  # type: ignore[assignment, misc]
        config.BlockConfig, disabled_features=int(disabled)
    )
    sys.exit(main(arguments))
