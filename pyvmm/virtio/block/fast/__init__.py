"""The fast path of the block device: requests of the usual shape, many at a time.

``BlockDevice`` serves a queue by it unless a rate limit wants to see each request.  A reader of
the plain path (``RingDevice``, ``ring/``) needs nothing of this room.
"""
