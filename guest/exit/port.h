/*
 * What the programs here share: a number from the command line, written to an I/O port.
 * They are freestanding, so that they run in any guest and need no C library to build.
 */

enum { SYS_exit = 60, SYS_ioperm = 173 };

static long system_call(long number, long a, long b, long c)
{
	long result;

	__asm__ volatile("syscall"
			 : "=a"(result)
			 : "a"(number), "D"(a), "S"(b), "d"(c)
			 : "rcx", "r11", "memory");
	return result;
}

/* `stack` is what the kernel hands to a program: argc, then argv[0], argv[1], ... */
__attribute__((unused)) static unsigned char byte_argument(const long *stack)
{
	const char *text = stack[0] > 1 ? (const char *)stack[2] : "0";
	unsigned char value = 0;

	while (*text >= '0' && *text <= '9')
		value = value * 10 + (*text++ - '0');
	return value;
}

/* 0, or 1 where the port may not be used (not root). */
static int write_port(unsigned short port, unsigned char value)
{
	if (system_call(SYS_ioperm, port, 1, 1) != 0)
		return 1;
	__asm__ volatile("outb %0, %1" : : "a"(value), "Nd"(port));
	return 0;
}

__attribute__((noreturn)) static void leave(int status)
{
	for (;;)
		system_call(SYS_exit, status, 0, 0);
}

__asm__(".globl _start\n_start: mov %rsp, %rdi\n\tcall start\n");
