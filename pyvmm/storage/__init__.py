"""Where a disk's bytes live: the BlockBackend protocol and its kinds."""
