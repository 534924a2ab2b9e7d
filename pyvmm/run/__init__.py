"""Running a machine: vCPU threads, I/O loops, signals, and how a run ended."""
