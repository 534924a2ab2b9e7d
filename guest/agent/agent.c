/* The agent: runs commands and moves files in the guest, on the host's orders (docs/agent.md).
 *
 *   pyvmm-agent              as process 1 of an initramfs: starts the agent, then becomes /init
 *   pyvmm-agent --daemon     serves the virtio port org.pyvmm.agent, in the background
 *   pyvmm-agent --fd N       serves descriptor N, where it is: for tests
 *
 * One process with one poll loop talks to the host and owns pipes; each job is a child: a command,
 * or a transfer that does its work with blocking calls.  So a slow disk holds up nobody else.
 * Memory is bounded: fixed buffers, and WINDOW bytes of input for each of MAX_JOBS jobs.
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include "agent.h"

int main(int argc, char **argv)
{
	if (getpid() == 1) {
		start_from_initramfs(argv[0]);
		argv[0] = "/init";
		execv("/init", argv);
		complain("/init: %s", strerror(errno));
		return 1;
	}
	if (argc == 2 && !strcmp(argv[1], "--daemon")) {
		pid_t pid = fork();
		if (pid == 0)
			be_daemon(0);
		return pid < 0;
	}
	if (argc == 3 && !strcmp(argv[1], "--fd")) {
		port = atoi(argv[2]);
		stays_here = true;
		set_signals();
		if (fcntl(port, F_SETFL, O_NONBLOCK) || fcntl(port, F_SETFD, FD_CLOEXEC)) {
			fprintf(stderr, "pyvmm-agent: descriptor %s: %s\n", argv[2], strerror(errno));
			return 1;
		}
		serve();
		return 0;
	}
	fprintf(stderr, "usage: pyvmm-agent --daemon | --fd N\n");
	return 2;
}
