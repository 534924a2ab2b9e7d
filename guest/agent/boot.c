/* The start: as process 1 of an initramfs, when the root is ready, and which port is ours. */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <unistd.h>
#include "agent.h"

#define PORT_NAME "org.pyvmm.agent"

/* The name and number of our port's device, or false. */
static bool find_port(char *name, size_t size, dev_t *number)
{
	int fd = open_kernel(sys_fd, sys_path, "class/virtio-ports", O_RDONLY | O_DIRECTORY);
	DIR *list = fd < 0 ? NULL : fdopendir(fd);
	struct dirent *next;
	char path[300], text[64];
	unsigned high, low;
	bool is_found = false;
	while (list && !is_found && (next = readdir(list))) {
		snprintf(path, sizeof path, "%.200s/name", next->d_name);
		if (next->d_name[0] == '.' || read_kernel(fd, path, "", text, sizeof text))
			continue;
		text[strcspn(text, "\n")] = 0;
		snprintf(path, sizeof path, "%.200s/dev", next->d_name);
		if (strcmp(text, PORT_NAME) || read_kernel(fd, path, "", text, sizeof text) ||
		    sscanf(text, "%u:%u", &high, &low) != 2)
			continue;
		*number = makedev(high, low);
		snprintf(name, size, "/dev/%.200s", next->d_name);
		is_found = true;
	}
	if (list)
		closedir(list);
	return is_found;
}

static int open_port(const char *name, dev_t number)
{
	static const char own[] = "/.pyvmm-agent-port";
	int fd = -1, flags = O_RDWR | O_NONBLOCK | O_NOCTTY | O_CLOEXEC;
	/* A device file of our own, so that the init's /dev is not in use by us. */
	if (proc_fd == AT_FDCWD)
		fd = open(name, flags);
	if (fd < 0 && (proc_fd != AT_FDCWD || errno == ENOENT)) {
		unlink(own);
		if (mknod(own, S_IFCHR | 0600, number))
			return -1;
		fd = open(own, flags);
		int error = errno;
		unlink(own);
		errno = error;
	}
	return fd;
}

/* True once process 1 is where the guest's user will be, and has set up the first things. */
static bool is_settled(dev_t initramfs)
{
	static int64_t there_ms;
	char text[4096], exe[300] = "", *name;
	struct stat st;
	bool is_there, is_ready;
	int root = open_kernel(proc_fd, proc_path, "1/root", O_PATH | O_DIRECTORY);
	if (root < 0 || fstat(root, &st)) {
		drop(&root);
		return false;
	}
	snprintf(text, sizeof text, "%s1/exe", proc_path);
	if (readlinkat(proc_fd, text, exe, sizeof exe - 1) < 0)
		exe[0] = 0;
	name = strrchr(exe, '/');
	is_there = st.st_dev != initramfs;
	if (!is_there && !read_kernel(proc_fd, proc_path, "cmdline", text, sizeof text))
		/* Without a root to come, the initramfs is all there is. */
		is_there = strncmp(text, "root=", 5) && !strstr(text, " root=") &&
			   strcmp(exe, "/pyvmm-agent");
	if (!is_there) {
		drop(&root);
		return false;
	}
	if (!there_ms)
		there_ms = now_ms();
	/* Any other init mounts these two, or never will. */
	if (name && !strcmp(name, "/systemd"))
		is_ready = systemd_answers(root) || now_ms() - there_ms > 60000;
	else
		is_ready = (!fstatat(root, "proc/1", &st, 0) && !fstatat(root, "dev/null", &st, 0)) ||
			   now_ms() - there_ms > 3000;
	drop(&root);
	return is_ready;
}

_Noreturn void be_daemon(dev_t initramfs)
{
	char name[300];
	dev_t number;
	bool was_open = false;
	int null = open("/", O_RDONLY | O_DIRECTORY);
	setsid();
	/* Of no use, but nothing that is opened later becomes a child's standard output by accident;
	 * and the console is not in use by us. */
	for (int i = 0; i < 3; i++)
		dup2(null, i);
	if (null > 2)
		close(null);
	if (chdir("/"))
		_exit(1);
	set_signals();
	set_oom_score("-1000");
	for (int64_t began = now_ms(), settled = 0;; nap(was_open || now_ms() - began > 2000 ? 100 : 10)) {
		struct pollfd state = { -1, POLLOUT, 0 };
		if (initramfs && !settled && !is_settled(initramfs))
			continue;
		settled = 1;
		if (!find_port(name, sizeof name, &number))
			continue;
		port = open_port(name, number);
		if (port < 0 && errno == EBUSY)
			_exit(0);	/* another agent serves */
		if (port < 0) {
			if (errno != ENXIO && errno != ENODEV && errno != ENOENT)
				complain("%s: %s", name, strerror(errno));
			continue;
		}
		was_open = true;
		for (state.fd = port; poll(&state, 1, 0) > 0 && state.revents & POLLHUP;) {
			struct stat st;		/* the host is not there, or the port is gone */
			if (!find_port(name, sizeof name, &number) || fstat(port, &st) ||
			    st.st_rdev != number)
				break;
			nap(50);
		}
		serve();
		drop(&port);
	}
}

/* A file system of the kernel's that is mounted nowhere but in our descriptor: so it is there
 * whatever an init mounts, moves or unmounts, and never in its way. */
static int private_mount(const char *kind)
{
	static const char place[] = "/.pyvmm-agent";
	int fd = -1;
	mkdir(place, 0700);
	if (!mount(kind, place, kind, MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL)) {
		fd = open(place, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
		umount2(place, MNT_DETACH);
	}
	rmdir(place);
	return fd;
}

void start_from_initramfs(char *first_argument)
{
	static const char log[] = "/.pyvmm-agent-kmsg";
	struct stat st;
	if (!mknod(log, S_IFCHR | 0600, makedev(1, 11)))
		kmsg_fd = open(log, O_WRONLY | O_CLOEXEC);
	unlink(log);
	proc_fd = private_mount("proc");
	sys_fd = private_mount("sysfs");
	if (proc_fd < 0 || sys_fd < 0 || stat("/", &st)) {
		complain("no agent: cannot mount proc and sysfs: %s", strerror(errno));
		return;
	}
	proc_path = sys_path = "";
	pid_t pid = fork();
	if (pid < 0)
		complain("no agent: %s", strerror(errno));
	if (pid == 0) {
		/* systemd ends all processes of an initramfs but those named like this. */
		first_argument[0] = '@';
		be_daemon(st.st_dev);
	}
}
