"""A running machine driven over a socket: messages, server, client (docs/control.md)."""
