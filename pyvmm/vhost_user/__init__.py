"""vhost-user: virtqueues shared with another process over a Unix socket, from both sides.

``protocol`` is the messages, ``frontend`` the side that owns the queues, ``backend`` and
``server`` the side that serves them; ``block`` is a disk of ours that somebody else serves.
"""
