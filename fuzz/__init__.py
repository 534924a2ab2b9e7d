"""Fuzzers of everything that reads what nobody vouches for.  README.md says how to run them."""
