"""Building a kernel for guests: our options over a source tree, a tarball or Debian's source.

Standard library only, and nothing of the machine: ``kernels/build.py`` runs it before there is a
virtual environment.
"""
