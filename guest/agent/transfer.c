/* One file, as bytes, from and to the host. */
#define _GNU_SOURCE
#include <errno.h>
#include <sys/stat.h>
#include <unistd.h>
#include "agent.h"

void read_file(const char *path)
{
	/* Not to wait for what may never come: of /dev/kmsg or a FIFO, what is there. */
	int fd = open(path, O_RDONLY | O_NONBLOCK | O_NOCTTY | O_CLOEXEC);
	if (fd < 0)
		fail_at(path);
	for (;;) {
		ssize_t n = read(fd, block, sizeof block);
		if (n == 0 || (n < 0 && errno == EAGAIN))
			return;
		if (n > 0)
			write_all(1, block, n, "the host");
		else if (errno != EINTR && errno != EPIPE)
			fail_at(path);
	}
}

void write_file(const char *path, mode_t mode)
{
	int fd = open(path, O_WRONLY | O_CREAT | O_EXCL | O_NOCTTY | O_CLOEXEC, 0600);
	size_t n;
	if (fd >= 0 && fchmod(fd, mode))
		fail_at(path);
	if (fd < 0 && errno == EEXIST)
		fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_NOCTTY | O_CLOEXEC, mode);
	if (fd < 0)
		fail_at(path);
	/* In as few calls as can be: a file of the kernel's takes a value in one. */
	while ((n = read_some(0, block, sizeof block, "the host")))
		write_all(fd, block, n, path);
	if (close(fd))
		fail_at(path);
}
