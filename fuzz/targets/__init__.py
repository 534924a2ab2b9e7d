"""One module a target; each has ``make``."""
