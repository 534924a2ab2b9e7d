"""virtio-console (virtio 1.2, 5.3 "Console Device")."""
