"""virtio-rng (virtio 1.2, 5.4 "Entropy Device")."""
