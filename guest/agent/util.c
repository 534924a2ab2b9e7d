/* Small things, the kernel's log, and the kernel's file systems. */
#define _GNU_SOURCE
#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>
#include "agent.h"

bool stays_here;

/* The kernel's file systems: ours alone, mounted nowhere, or where everybody has them. */
int proc_fd = AT_FDCWD, sys_fd = AT_FDCWD, kmsg_fd = -1;
const char *proc_path = "/proc/", *sys_path = "/sys/";

int64_t now_ms(void)
{
	struct timespec now;
	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * 1000LL + now.tv_nsec / 1000000;
}

void nap(int ms)
{
	struct timespec time = { ms / 1000, ms % 1000 * 1000000L };
	nanosleep(&time, NULL);
}

void drop(int *fd)
{
	if (*fd >= 0)
		close(*fd);
	*fd = -1;
}

/* Into the kernel's log: only if something is wrong, and not without end. */
void complain(const char *format, ...)
{
	static int left = 20;
	char line[300] = "<4>pyvmm-agent: ";
	size_t length = strlen(line);
	int fd = kmsg_fd >= 0 ? kmsg_fd : open("/dev/kmsg", O_WRONLY | O_CLOEXEC);
	va_list list;
	if (stays_here)
		fd = STDERR_FILENO;
	va_start(list, format);
	vsnprintf(line + length, sizeof line - length - 1, format, list);
	va_end(list);
	strcat(line, "\n");
	if (fd >= 0 && left-- > 0 && write(fd, line, strlen(line)) < 0)
		left = 0;
	if (fd >= 0 && fd != kmsg_fd && !stays_here)
		close(fd);
}

int open_kernel(int dir, const char *prefix, const char *rest, int flags)
{
	char path[300];
	snprintf(path, sizeof path, "%s%s", prefix, rest);
	return openat(dir, path, flags | O_CLOEXEC);
}

int read_kernel(int dir, const char *prefix, const char *rest, char *text, size_t size)
{
	int fd = open_kernel(dir, prefix, rest, O_RDONLY);
	ssize_t n = fd < 0 ? -1 : read(fd, text, size - 1);
	drop(&fd);
	text[n < 0 ? 0 : n] = 0;
	return n < 0 ? -1 : 0;
}

void set_oom_score(const char *score)
{
	int fd = open_kernel(proc_fd, proc_path, "self/oom_score_adj", O_WRONLY);
	if (fd >= 0 && write(fd, score, strlen(score)) < 0)
		errno = 0;	/* not as root: then like anybody */
	drop(&fd);
}
