"""A machine in a process of its own, driven over its control socket: ``pyvmm.launch``."""
