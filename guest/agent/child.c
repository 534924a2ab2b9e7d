/* A job's own process: how it begins and fails, and whole reads and writes. */
#define _GNU_SOURCE
#include <errno.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>
#include "agent.h"

uint8_t block[MAX_PAYLOAD];

static int why_fd = -1;

_Noreturn void fail(int error, const char *format, ...)
{
	char message[4 + MAX_TEXT + 1];
	va_list list;
	put32((uint8_t *)message, error);
	va_start(list, format);
	vsnprintf(message + 4, sizeof message - 4, format, list);
	va_end(list);
	if (write(why_fd, message, 4 + strlen(message + 4)) < 0)
		_exit(2);
	_exit(1);
}

_Noreturn void fail_at(const char *path)
{
	int error = errno;
	fail(error, "%.900s: %s", path, strerror(error));
}

/* Up to size bytes, fewer only at the end or where a file has no more for now. */
size_t read_some(int fd, void *data, size_t size, const char *path)
{
	size_t n = 0;
	while (n < size) {
		ssize_t got = read(fd, (char *)data + n, size - n);
		if (got == 0 || (got < 0 && errno == EAGAIN))
			break;
		if (got > 0)
			n += got;
		else if (errno != EINTR && errno != EPIPE)	/* /dev/kmsg: lines were overwritten */
			fail_at(path);
	}
	return n;
}

void write_all(int fd, const void *data, size_t size, const char *path)
{
	for (size_t n = 0; n < size;) {
		ssize_t done = write(fd, (const char *)data + n, size - n);
		if (done >= 0)
			n += done;
		else if (errno != EINTR)
			fail_at(path);
	}
}

/* The root of process 1, wherever an init has gone since we were started. */
static void enter_root(void)
{
	struct stat there, here;
	int fd = stays_here ? -1 : open_kernel(proc_fd, proc_path, "1/root", O_PATH | O_DIRECTORY);
	if (fd >= 0 && !fstat(fd, &there) && !stat("/", &here) &&
	    (there.st_dev != here.st_dev || there.st_ino != here.st_ino) &&
	    (fchdir(fd) || chroot(".")))
		fail_at("the root of process 1");
	drop(&fd);
	if (!stays_here && chdir("/"))
		fail_at("/");
}

_Noreturn void child(int kind, const uint8_t *payload, int pipes[4][2])
{
	/* As the kernel has them: SIG_DFL, no flags, no restorer, an empty mask. */
	const struct { unsigned long handler, flags, restorer, mask; } by_default = { 0 };
	const unsigned long no_signals = 0;
	setsid();
	for (int i = 0; i < 3; i++)
		dup2(pipes[i][i > 0], i);
	why_fd = pipes[3][1];
	/* Exec closes all; but a transfer must not hold other jobs' pipes open either. */
	for (struct job *other = jobs; other < jobs + SLOTS; other++)
		if (other->is_used)
			close_pipes(other);
	drop(&port);
	for (int i = 0; i < 4; i++) {
		drop(&pipes[i][i == 0]);
		if (i < 3)
			drop(&pipes[i][i > 0]);
	}
	/* The calls themselves: the C library keeps its hands off three signals of its own. */
	for (int number = 1; number <= LAST_SIGNAL; number++)
		syscall(SYS_rt_sigaction, number, &by_default, NULL, sizeof no_signals);
	syscall(SYS_rt_sigprocmask, SIG_SETMASK, &no_signals, NULL, sizeof no_signals);
	if (!stays_here)
		set_oom_score("0");
	enter_root();
	switch (kind) {
	case RUN: run(payload); break;
	case PUT: put((const char *)payload); break;
	case GET: get((const char *)payload); break;
	case READ: read_file((const char *)payload); break;
	case CLONE: be_clone(payload); break;
	case WRITE: write_file((const char *)payload + 4, get32(payload) & 07777); break;
	}
	_exit(0);
}
