/*
 * pyvmm-mark NUMBER: mark this moment with NUMBER (0-255) for `pyvmm run --timing`.
 *
 * Writes the byte to I/O port 0xf8.  1 is "init runs", 2 "user space is set up", 3 "its work is
 * done"; what other numbers mean is the guest's affair.  Returns 1 when the port may not be used
 * (not root); a machine that takes no times ignores the write.
 */

#include "port.h"

enum { MARK_PORT = 0xf8 };

__attribute__((used, noreturn)) static void start(long *stack)
{
	leave(write_port(MARK_PORT, byte_argument(stack)));
}
