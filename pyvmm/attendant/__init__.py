"""The attendant: a process beside a jailed machine that does what the machine may not."""
