"""The guest's console on the host: a terminal, a file or nothing."""
