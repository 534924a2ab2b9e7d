"""Legacy devices on the PIO bus: 16550A serial port, i8042, debug exit."""
