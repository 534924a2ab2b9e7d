"""vhost-user: virtqueues shared with another process over a Unix socket, from both sides.

``protocol`` has the messages.  ``frontend`` is the side that owns the queues, ``backend`` and
``server`` the side that serves them.  ``block`` is a disk of ours that another process serves.
"""
