"""pyvmm: a full minimal KVM hypervisor in pure Python.

Start reading at ``pyvmm/machine.py``: ``build()`` is the whole machine from top to bottom.
This module imports nothing, so that ``import pyvmm`` costs nothing on the boot path.
"""

__version__ = "0.1.0"
