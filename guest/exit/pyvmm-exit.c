/*
 * pyvmm-exit STATUS: end the machine with STATUS (0-255) as pyvmm's exit status, at once.
 *
 * Writes the byte to I/O port 0xf4.  Nothing is synced or unmounted first: that is init's work.
 * Returns 1 when the port may not be used (not root) or when nothing answers there.
 */

#include "port.h"

enum { EXIT_PORT = 0xf4 };

__attribute__((used, noreturn)) static void start(long *stack)
{
	write_port(EXIT_PORT, byte_argument(stack));
	leave(1);
}
