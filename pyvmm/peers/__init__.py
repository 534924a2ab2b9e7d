"""Connections to other processes: sockets, deadlines, eventfds that a peer has too."""
