"""Many boot tests from one file: ``pyvmm matrix``."""
