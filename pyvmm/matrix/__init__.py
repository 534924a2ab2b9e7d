"""Many boot tests from one file: ``pyvmm matrix`` (docs/matrix.md).

``read`` makes a ``Plan`` of the file, ``expand`` the runs, an executor has ``one_run`` done for
each, and ``session`` shows what goes on and writes the reports.
"""
