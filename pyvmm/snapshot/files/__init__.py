"""The directory of a snapshot: its format, its checks, merging (docs/snapshot-format.md).

``DIR/state`` has records, ``DIR/ram`` the guest's RAM, ``DIR/diskN.overlay`` what disk N has over
its file.  ``Writer`` makes a directory, ``open_saved`` checks and opens one.  Nothing changes it in
between.
"""
