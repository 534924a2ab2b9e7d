/* When systemd takes orders. */
#define _GNU_SOURCE
#include <poll.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>
#include "agent.h"

/* True once systemd answers at its own socket, as it does for systemctl: the file is there, and
 * connections are queued, long before its event loop runs. */
bool systemd_answers(int root)
{
	static int fd = -1;
	static const char hello[] = "\0AUTH EXTERNAL 30\r\n";	/* D-Bus: user "0", in hex */
	struct sockaddr_un address = { AF_UNIX, "run/systemd/private" };
	struct pollfd state = { fd, POLLIN, 0 };
	if (fd < 0) {
		fd = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
		if (fd < 0 || fchdir(root) ||
		    connect(fd, (struct sockaddr *)&address, sizeof address) ||
		    send(fd, hello, sizeof hello - 1, MSG_NOSIGNAL) < 0)
			drop(&fd);
		if (chdir("/"))
			drop(&fd);
		return false;
	}
	if (poll(&state, 1, 0) <= 0)
		return false;
	drop(&fd);
	return true;
}
