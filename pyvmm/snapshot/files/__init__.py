"""The directory of a snapshot: its format, its checks, merging."""
