"""Devices on the PIO bus: 16550A serial port, i8042, RTC, power, pvpanic, debug exit, timer."""
