"""virtio 1.2: rings, the device contract, the MMIO transport and the devices."""
