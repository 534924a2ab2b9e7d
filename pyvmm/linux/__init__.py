"""Linux kernels as files: compression, configuration, modules, packages; and building them.

Nothing here knows of guests: ``x86`` loads and enters kernels, ``lab`` and ``cli`` fetch them.
"""
