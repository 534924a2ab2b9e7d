"""Boot tests: verdicts on a guest, and one test from boot to report."""
