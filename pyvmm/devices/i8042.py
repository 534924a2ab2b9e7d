"""The i8042 keyboard controller, as far as a PC without keyboard or mouse needs it.

Linux resets a machine through it (``reboot=k``, the default), and probes it while booting.  A
controller that does not answer costs two seconds ("i8042: Can't read CTR while initializing").
"""

from __future__ import annotations

from collections.abc import Callable

from pyvmm.devices.byte_device import ByteDevice
from pyvmm.startup.types import IntEnum


class Command(IntEnum):
    """Bytes written to the command port (IBM PS/2 Hardware Interface, keyboard controller)."""

    READ_CONTROL = 0x20
    WRITE_CONTROL = 0x60
    TEST_AUX = 0xA9
    SELF_TEST = 0xAA
    TEST_KEYBOARD = 0xAB
    READ_OUTPUT = 0xD0
    WRITE_OUTPUT = 0xD1
    AUX_LOOPBACK = 0xD3
    RESET_CPU = 0xFE


_WITH_DATA = (Command.WRITE_CONTROL, Command.WRITE_OUTPUT, Command.AUX_LOOPBACK)
"""Commands whose argument is the next byte written to the data port."""

_STATUS_OUTPUT_FULL = 0x01
_STATUS_SYSTEM = 0x04
_OUTPUT_NOT_RESET = 0x01
_CONTROL_AT_RESET = 0x30 | _STATUS_SYSTEM  # both ports' clocks disabled, system flag set
_SELF_TEST_PASSED = 0x55
_PORT_TEST_FAILED = 0x01


class _Registers(ByteDevice):
    """One of the controller's two ports; they are not adjacent (0x60 and 0x64)."""

    def __init__(self, read: Callable[[], int], write: Callable[[int], None]) -> None:
        self._read = read
        self._write = write

    def read_byte(self, offset: int) -> int:
        return self._read()

    def write_byte(self, offset: int, value: int) -> None:
        self._write(value)


class I8042:
    """Controller with no devices attached; ``on_reset`` is called when the guest pulls reset.

    ``data_port`` belongs at 0x60 and ``command_port`` at 0x64 of the PIO bus.
    """

    def __init__(self, on_reset: Callable[[], None]) -> None:
        self._on_reset = on_reset
        self._control = _CONTROL_AT_RESET
        self._output_port = _OUTPUT_NOT_RESET
        self._reply: int | None = None
        self._expects: Command | None = None
        self.data_port = _Registers(self._read_data, self._write_data)
        self.command_port = _Registers(self._read_status, self._write_command)

    def save(self) -> dict[str, object]:
        """Return the controller's state."""
        return {
            "control": self._control, "output_port": self._output_port, "reply": self._reply,
            "expects": None if self._expects is None else int(self._expects),
        }

    def restore(self, data: object) -> None:
        """Take what ``save`` returned; StateError."""
        from pyvmm.state import Fields  # not on the boot path

        fields = Fields("i8042", data)
        control = fields.integer("control", 0, 0xFF)
        output_port = fields.integer("output_port", 0, 0xFF)
        reply = fields.optional_integer("reply", 0, 0xFF)
        expects = fields.optional_integer("expects", 0, 0xFF)
        if expects is not None and expects not in _WITH_DATA:
            raise fields.error("expects", f"is not None or one of {_WITH_DATA}")
        fields.end()
        self._control, self._output_port, self._reply = control, output_port, reply
        self._expects = None if expects is None else Command(expects)

    def _read_status(self) -> int:
        return _STATUS_SYSTEM | (_STATUS_OUTPUT_FULL if self._reply is not None else 0)

    def _read_data(self) -> int:
        reply, self._reply = self._reply, None
        return 0 if reply is None else reply

    def _write_command(self, value: int) -> None:
        self._expects = None
        match value:
            case Command.READ_CONTROL:
                self._reply = self._control
            case Command.SELF_TEST:
                self._reply = _SELF_TEST_PASSED
            case Command.TEST_KEYBOARD:
                self._reply = 0
            case Command.TEST_AUX:
                self._reply = _PORT_TEST_FAILED
            case Command.READ_OUTPUT:
                self._reply = self._output_port
            case _ if value in _WITH_DATA:
                self._expects = Command(value)
            case Command.RESET_CPU:
                self._on_reset()
            case _:
                pass  # enabling and disabling ports that have nothing behind them

    def _write_data(self, value: int) -> None:
        expects, self._expects = self._expects, None
        match expects:
            case Command.WRITE_CONTROL:
                self._control = value
            case Command.WRITE_OUTPUT:
                self._output_port = value
                if not value & _OUTPUT_NOT_RESET:
                    self._on_reset()
            case Command.AUX_LOOPBACK:
                # Answering without the AUX status bit tells Linux at once that there is no mouse.
                self._reply = value
            case _:
                pass  # a byte for the keyboard that is not there
