"""Tests that take hours: parts of many trials each, which go on where they were stopped."""
