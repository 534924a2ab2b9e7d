"""Disk images from a directory, a tar archive, busybox or Debian's packages; no root needed."""
