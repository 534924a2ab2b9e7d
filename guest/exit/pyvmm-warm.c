/*
 * pyvmm-warm: this machine is warm, and `pyvmm run --snapshot` saves it now.
 *
 * Writes 1 to I/O port 0xf9.  A clone of the snapshot goes on right behind the write, as the
 * machine itself does.  Returns 1 when the port may not be used (not root); a machine that takes no
 * snapshot ignores the write.
 */

#include "port.h"

enum { WARM_PORT = 0xf9, WARM_NOW = 1 };

__attribute__((used, noreturn)) static void start(long *stack)
{
	(void)stack;
	leave(write_port(WARM_PORT, WARM_NOW));
}
