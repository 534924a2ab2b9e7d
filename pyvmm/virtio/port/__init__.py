"""The port by which an agent in the guest is spoken to."""
