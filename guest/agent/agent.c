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
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/un.h>
#include <sys/utsname.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define PORT_NAME "org.pyvmm.agent"

enum {
	VERSION = 1, HEADER = 12, MAX_PAYLOAD = 65536, MAX_JOBS = 16, WINDOW = 262144,
	MAX_TEXT = 1024, MAX_PING = 64, LAST_SIGNAL = 64, PATH_BYTES = 4096,
	SLOTS = 2 * MAX_JOBS,	/* jobs of a host that went away stay until their process ends */
	CHUNK = 32768 - HEADER,	/* a virtio port takes 32 KiB a call */
	RESERVE = 4096,		/* what answers to one frame, and an EXIT, need at most */
};
enum { HELLO = 1, DATA, CREDIT, EXIT, PONG,
       START = 16, RUN, PUT, GET, READ, WRITE, KILL, PING };
enum { HAS_INPUT = 1, EXACT_ENV = 2 };
enum { EXITED, SIGNALLED, FAILED };

static const char *const default_env[] = {
	"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root", "TERM=linux",
};

struct output {		/* a pipe from a job, -1 at its end */
	int fd;
	uint32_t credit;	/* bytes that the host takes */
	int left;		/* once the process has ended: bytes that it left in the pipe; else -1 */
	bool is_told;		/* the host knows of the end */
};

struct job {
	bool is_used;
	uint32_t id;		/* 0: nobody wants to know how it ends */
	int kind;
	pid_t pid;		/* also its process group; 0 once it has ended */
	int status;
	bool is_killed, is_timed_out;
	int64_t until_ms;	/* 0: no time limit */
	int why;		/* the child says here why it failed */
	int input;		/* the pipe to it, -1 if it takes no more */
	bool has_input, is_input_over;
	uint8_t *waiting;	/* WINDOW bytes, in a circle: input for the pipe */
	uint32_t first, count;
	uint32_t unreturned;	/* bytes of input that the host has no credit for: these and those */
	uint32_t returnable;	/* of them that went on, or were dropped */
	struct output outputs[2];
};

static struct job jobs[SLOTS];
static uint8_t in[2 * (MAX_PAYLOAD + HEADER)], out[4 * CHUNK];
static size_t in_count, out_first, out_end;
static bool is_started;		/* the host has said START */
static int port = -1;
static bool stays_here;		/* --fd: commands run in our own root */
static int why_fd = -1;		/* in a child */

/* The kernel's file systems: ours alone, mounted nowhere, or where everybody has them. */
static int proc_fd = AT_FDCWD, sys_fd = AT_FDCWD, kmsg_fd = -1;
static const char *proc_path = "/proc/", *sys_path = "/sys/";

/* ---- small things ---- */

static uint16_t get16(const uint8_t *p) { return p[0] | p[1] << 8; }
static uint32_t get32(const uint8_t *p) { return get16(p) | (uint32_t)get16(p + 2) << 16; }
static void put16(uint8_t *p, uint32_t v) { p[0] = v; p[1] = v >> 8; }
static void put32(uint8_t *p, uint32_t v) { put16(p, v); put16(p + 2, v >> 16); }
static size_t least(size_t a, size_t b) { return a < b ? a : b; }

static int64_t now_ms(void)
{
	struct timespec now;
	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * 1000LL + now.tv_nsec / 1000000;
}

static void nap(int ms)
{
	struct timespec time = { ms / 1000, ms % 1000 * 1000000L };
	nanosleep(&time, NULL);
}

static void drop(int *fd)
{
	if (*fd >= 0)
		close(*fd);
	*fd = -1;
}

/* Into the kernel's log: only if something is wrong, and not without end. */
static void complain(const char *format, ...)
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

static int open_kernel(int dir, const char *prefix, const char *rest, int flags)
{
	char path[300];
	snprintf(path, sizeof path, "%s%s", prefix, rest);
	return openat(dir, path, flags | O_CLOEXEC);
}

static int read_kernel(int dir, const char *prefix, const char *rest, char *text, size_t size)
{
	int fd = open_kernel(dir, prefix, rest, O_RDONLY);
	ssize_t n = fd < 0 ? -1 : read(fd, text, size - 1);
	drop(&fd);
	text[n < 0 ? 0 : n] = 0;
	return n < 0 ? -1 : 0;
}

static void set_oom_score(const char *score)
{
	int fd = open_kernel(proc_fd, proc_path, "self/oom_score_adj", O_WRONLY);
	if (fd >= 0 && write(fd, score, strlen(score)) < 0)
		errno = 0;	/* not as root: then like anybody */
	drop(&fd);
}

/* ---- in the child: failures, and whole reads and writes ---- */

static _Noreturn void fail(int error, const char *format, ...)
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

static _Noreturn void fail_at(const char *path)
{
	int error = errno;
	fail(error, "%.900s: %s", path, strerror(error));
}

/* Up to size bytes, fewer only at the end or where a file has no more for now. */
static size_t read_some(int fd, void *data, size_t size, const char *path)
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

static void write_all(int fd, const void *data, size_t size, const char *path)
{
	for (size_t n = 0; n < size;) {
		ssize_t done = write(fd, (const char *)data + n, size - n);
		if (done >= 0)
			n += done;
		else if (errno != EINTR)
			fail_at(path);
	}
}

/* ---- tar ---- */

static uint8_t block[MAX_PAYLOAD];	/* a child's buffer */

enum { NAME = 0, MODE = 100, UID = 108, GID = 116, SIZE = 124, MTIME = 136, SUM = 148, TYPE = 156,
       LINK = 157, MAGIC = 257, MAJOR = 329, MINOR = 337, PREFIX = 345 };

static unsigned checksum(const uint8_t *header)
{
	unsigned sum = 8 * ' ';
	for (int i = 0; i < 512; i++)
		sum += i >= SUM && i < SUM + 8 ? 0 : header[i];
	return sum;
}

/* Octal, or in the GNU way a binary number where that is too short or cannot be negative. */
static void put_number(uint8_t *p, int length, int64_t value)
{
	if (value >= 0 && (length > 11 ? value < 1LL << 33 : value < 1LL << 3 * (length - 1))) {
		for (p[length - 1] = 0; --length > 0; value >>= 3)
			p[length - 1] = '0' + (value & 7);
		return;
	}
	uint64_t bits = value;
	for (int i = length - 1; i > 0; i--) {
		p[i] = bits;
		bits = bits >> 8 | (value < 0 ? 0xffULL << 56 : 0);
	}
	p[0] = value < 0 ? 0xff : 0x80;
}

static int64_t get_number(const uint8_t *p, int length)
{
	uint64_t value = 0;
	int i = 0;
	if (p[0] & 0x80) {
		value = p[0] & 0x40 ? -1 : p[0] & 0x3f;
		for (i = 1; i < length; i++)
			value = value << 8 | p[i];
		return value;
	}
	while (i < length && p[i] == ' ')
		i++;
	for (; i < length && p[i] >= '0' && p[i] <= '7'; i++)
		value = value << 3 | (p[i] - '0');
	if (i < length && p[i] && p[i] != ' ')
		fail(EINVAL, "the tar stream has a number that is none");
	return value;
}

static void put_header(const char *name, int type, const struct stat *st, int64_t size,
		       const char *link)
{
	static const uint8_t zeros[512];
	uint8_t header[512] = { 0 };
	const char *texts[] = { name, link };
	for (int i = 0; i < 2; i++) {
		size_t length = strlen(texts[i]);
		if (length > 100 && type != 'L' && type != 'K') {	/* GNU: a member that is a name */
			put_header("././@LongLink", i ? 'K' : 'L', &(struct stat){ 0 }, length + 1, "");
			write_all(1, texts[i], length + 1, "the host");
			write_all(1, zeros, (512 - (length + 1) % 512) % 512, "the host");
		}
		memcpy(header + (i ? LINK : NAME), texts[i], least(length, 100));
	}
	put_number(header + MODE, 8, st->st_mode & 07777);
	put_number(header + UID, 8, st->st_uid);
	put_number(header + GID, 8, st->st_gid);
	put_number(header + SIZE, 12, size);
	put_number(header + MTIME, 12, st->st_mtime);
	header[TYPE] = type;
	memcpy(header + MAGIC, "ustar  ", 8);
	if (type == '3' || type == '4') {
		put_number(header + MAJOR, 8, major(st->st_rdev));
		put_number(header + MINOR, 8, minor(st->st_rdev));
	}
	put_number(header + SUM, 7, checksum(header));
	header[SUM + 7] = ' ';
	write_all(1, header, 512, "the host");
}

static void pack_file(int fd, const char *name, const struct stat *st)
{
	/* The kernel's files have no size, or a wrong one, until they are read. */
	size_t n = read_some(fd, block, sizeof block, name);
	int64_t left, size = n == sizeof block && st->st_size > (int64_t)n ? st->st_size : (int64_t)n;
	char more;
	if (n == sizeof block && size == (int64_t)n && read_some(fd, &more, 1, name))
		fail(EFBIG, "%.900s: has no size of its own; read it instead", name);
	put_header(name, '0', st, size, "");
	for (left = size;;) {
		write_all(1, block, n, "the host");
		left -= n;
		if (!left)
			break;
		n = read_some(fd, block, least(sizeof block, left), name);
		if (!n)
			fail(EIO, "%.900s: became shorter while it was read", name);
	}
	memset(block, 0, 512);
	write_all(1, block, (512 - size % 512) % 512, "the host");
}

/* name is entry's path in the archive, and has room to grow. */
static void pack(int dir, const char *entry, char *name, int follow)
{
	struct stat st;
	struct dirent *next;
	size_t length = strlen(name);
	char target[PATH_BYTES] = "";
	int fd;
	if (fstatat(dir, entry, &st, follow ? 0 : AT_SYMLINK_NOFOLLOW)) {
		if (errno == ENOENT && !follow)
			return;		/* gone since it was listed */
		fail_at(follow ? entry : name);
	}
	switch (st.st_mode & S_IFMT) {
	case S_IFLNK:
		if (readlinkat(dir, entry, target, sizeof target - 1) < 0)
			fail_at(name);
		put_header(name, '2', &st, 0, target);
		return;
	case S_IFCHR: put_header(name, '3', &st, 0, ""); return;
	case S_IFBLK: put_header(name, '4', &st, 0, ""); return;
	case S_IFIFO: put_header(name, '6', &st, 0, ""); return;
	case S_IFREG: case S_IFDIR: break;
	default: return;		/* a socket is nothing to keep */
	}
	fd = openat(dir, entry, O_RDONLY | O_NONBLOCK | O_CLOEXEC | (follow ? 0 : O_NOFOLLOW));
	if (fd < 0) {
		if (errno == ENOENT && !follow)
			return;
		fail_at(follow ? entry : name);
	}
	if (S_ISREG(st.st_mode)) {
		pack_file(fd, name, &st);
		close(fd);
		return;
	}
	DIR *list = fdopendir(fd);
	if (!list)
		fail_at(name);
	if (length + 2 > PATH_BYTES)
		fail(ENAMETOOLONG, "%.900s: %s", name, strerror(ENAMETOOLONG));
	strcpy(name + length++, "/");
	put_header(name, '5', &st, 0, "");
	while (errno = 0, (next = readdir(list))) {
		if (!strcmp(next->d_name, ".") || !strcmp(next->d_name, ".."))
			continue;
		if (length + strlen(next->d_name) + 1 > PATH_BYTES)
			fail(ENAMETOOLONG, "%.900s: %s", name, strerror(ENAMETOOLONG));
		strcpy(name + length, next->d_name);
		pack(fd, next->d_name, name, 0);
		name[length] = 0;
	}
	if (errno)
		fail_at(name);
	closedir(list);
}

static void get(const char *path)
{
	static char name[PATH_BYTES];
	size_t end = strlen(path), begin;
	while (end > 1 && path[end - 1] == '/')
		end--;
	for (begin = end; begin > 0 && path[begin - 1] != '/';)
		begin--;
	memcpy(name, path + begin, end - begin);
	if (!name[0] || !strcmp(name, ".."))
		strcpy(name, ".");
	pack(AT_FDCWD, path, name, 1);
	memset(block, 0, 1024);
	write_all(1, block, 1024, "the host");
}

/* Where a stream is unpacked. */
static int base;
static bool base_is_root;

/* The path below base of the member name, without symbolic links before its last part; makes
 * directories that are missing.  Links are followed as long as they stay below base. */
static void resolve(const char *name, char *path)
{
	char rest[2 * PATH_BYTES], link[PATH_BYTES];
	char *p = rest;
	size_t length = 0;
	int links = 0;
	snprintf(rest, sizeof rest, "%s", name);
	path[0] = 0;
	for (;;) {
		p += strspn(p, "/");
		if (!*p)
			break;
		size_t n = strcspn(p, "/");
		char *end = p + n;
		bool is_last = !end[strspn(end, "/")];
		struct stat st;
		if (n == 2 && !memcmp(p, "..", 2)) {
			if (!length || !links)
				fail(EXDEV, "%.900s: leads out of the target", name);
			char *slash = strrchr(path, '/');
			length = slash ? slash - path : 0;
			path[length] = 0;
		} else if (n != 1 || *p != '.') {
			size_t parent = length;
			if (length + n + 2 > PATH_BYTES)
				fail(ENAMETOOLONG, "%.900s: %s", name, strerror(ENAMETOOLONG));
			length += sprintf(path + length, "%s%.*s", length ? "/" : "", (int)n, p);
			if (!is_last && fstatat(base, path, &st, AT_SYMLINK_NOFOLLOW)) {
				if (errno != ENOENT || mkdirat(base, path, 0755))
					fail_at(name);
			} else if (!is_last && S_ISLNK(st.st_mode)) {
				ssize_t got = readlinkat(base, path, link, sizeof link);
				if (got < 0 || got == sizeof link || strlen(end) + got >= PATH_BYTES)
					fail(ENAMETOOLONG, "%.900s: %s", name, strerror(ENAMETOOLONG));
				if (++links > 40)
					fail(ELOOP, "%.900s: %s", name, strerror(ELOOP));
				if (link[0] == '/' && !base_is_root)
					fail(EXDEV, "%.900s: a symbolic link leads out of the target", name);
				length = link[0] == '/' ? 0 : parent;
				path[length] = 0;
				memmove(rest + got, end, strlen(end) + 1);
				memcpy(rest, link, got);
				p = rest;
				continue;
			} else if (!is_last && !S_ISDIR(st.st_mode)) {
				fail(ENOTDIR, "%.900s: %s", name, strerror(ENOTDIR));
			}
		}
		p = end;
	}
}

struct member {
	char name[PATH_BYTES], link[PATH_BYTES];
	bool has_name, has_link, has_size, has_mtime, has_uid, has_gid;	/* from records before it */
	int64_t size, uid, gid;
	struct timespec times[2];
	mode_t mode;
};

static void read_input(void *data, size_t size)
{
	if (read_some(0, data, size, "the host") != size)
		fail(EPIPE, "the tar stream ends too early");
}

static void skip_input(int64_t size)
{
	for (size_t n; size > 0; size -= n)
		read_input(block, n = least(sizeof block, size));
}

/* A number of a record: seconds with a fraction, or whole. */
static int64_t decimal(const char *text, long *fraction)
{
	char *end;
	long unit = 100000000;
	int64_t value = strtoll(text, &end, 10);
	*fraction = 0;
	if (*end == '.')
		for (end++; *end >= '0' && *end <= '9'; end++, unit /= 10)
			*fraction += (*end - '0') * unit;
	if (*end || end == text)
		fail(EINVAL, "the tar stream has a number that is none");
	if (text[0] == '-' && *fraction) {	/* the fraction counts down there */
		value--;
		*fraction = 1000000000 - *fraction;
	}
	return value;
}

/* The POSIX extended header in block: lines of "LENGTH KEY=VALUE\n". */
static void take_records(struct member *m, size_t size)
{
	char *p = (char *)block, *stop = p + size, *key, *value, *end;
	long fraction;
	while (p < stop && *p) {
		size_t length = strtoul(p, &key, 10);
		if (*key != ' ' || length > (size_t)(stop - p) || p + length <= key + 1 ||
		    p[length - 1] != '\n')
			fail(EINVAL, "the tar stream has a damaged extended header");
		end = p + length - 1;
		*end = 0;
		key++;
		value = memchr(key, '=', end - key);
		if (!value)
			fail(EINVAL, "the tar stream has a damaged extended header");
		*value++ = 0;
		if (!strcmp(key, "path") || !strcmp(key, "linkpath")) {
			bool is_link = *key == 'l';
			if (end - value >= PATH_BYTES)
				fail(ENAMETOOLONG, "%.900s: %s", value, strerror(ENAMETOOLONG));
			strcpy(is_link ? m->link : m->name, value);
			*(is_link ? &m->has_link : &m->has_name) = true;
		} else if (!strcmp(key, "size")) {
			m->size = decimal(value, &fraction);
			m->has_size = true;
		} else if (!strcmp(key, "mtime")) {
			m->times[1].tv_sec = decimal(value, &m->times[1].tv_nsec);
			m->has_mtime = true;
		} else if (!strcmp(key, "uid")) {
			m->uid = decimal(value, &fraction);
			m->has_uid = true;
		} else if (!strcmp(key, "gid")) {
			m->gid = decimal(value, &fraction);
			m->has_gid = true;
		} else if (!strncmp(key, "GNU.sparse", 10)) {
			fail(ENOTSUP, "the tar stream has a sparse member, which is not supported");
		}
		p = end + 1;
	}
}

/* New directories get their modes and times once all in them is there.  All of those that are
 * not finished are parents of one another: one path, and their lengths. */
static struct {
	char path[PATH_BYTES];
	int count;
	struct { size_t length; mode_t mode; struct timespec times[2]; } dirs[PATH_BYTES / 2];
} unfinished;

static void finish_dirs(const char *path)
{
	while (unfinished.count) {
		size_t length = unfinished.dirs[unfinished.count - 1].length;
		if (path && !strncmp(path, unfinished.path, length) && path[length] == '/')
			return;
		unfinished.count--;
		unfinished.path[length] = 0;
		if (fchmodat(base, unfinished.path, unfinished.dirs[unfinished.count].mode, 0) ||
		    utimensat(base, unfinished.path, unfinished.dirs[unfinished.count].times,
			      AT_SYMLINK_NOFOLLOW))
			fail_at(unfinished.path);
	}
}

static void set_owner(const char *path, const struct member *m)
{
	if (fchownat(base, path, m->uid, m->gid, AT_SYMLINK_NOFOLLOW) && geteuid() == 0 &&
	    errno != EPERM && errno != EINVAL)	/* file systems without owners */
		fail_at(path);
}

static void unpack_dir(const struct member *m, const char *path)
{
	char inside[PATH_BYTES + 2], ignored[PATH_BYTES];
	int i = unfinished.count;
	if (mkdirat(base, path, 0700)) {
		if (errno != EEXIST)
			fail_at(path);
		snprintf(inside, sizeof inside, "%s/.", path);	/* a directory, or a link to one? */
		resolve(inside, ignored);
		return;
	}
	set_owner(path, m);
	strcpy(unfinished.path, path);
	unfinished.dirs[i].length = strlen(path);
	unfinished.dirs[i].mode = m->mode;
	memcpy(unfinished.dirs[i].times, m->times, sizeof m->times);
	unfinished.count++;
}

static void unpack_file(struct member *m, const char *path)
{
	int fd = openat(base, path, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600);
	int64_t left = m->size;
	if (fd < 0)
		fail_at(path);
	for (size_t n; left > 0; left -= n) {
		read_input(block, n = least(sizeof block, left));
		write_all(fd, block, n, path);
	}
	skip_input((512 - m->size % 512) % 512);
	set_owner(path, m);
	if (fchmod(fd, m->mode) || futimens(fd, m->times) || close(fd))
		fail_at(path);
}

static void unpack_member(struct member *m, int type, const uint8_t *header)
{
	char path[PATH_BYTES], target[PATH_BYTES];
	static const mode_t kinds[] = { ['3'] = S_IFCHR, ['4'] = S_IFBLK, ['6'] = S_IFIFO };
	resolve(m->name, path);
	if (!path[0] && type == '5')
		return;		/* the target itself: it is as it is */
	if (!path[0])
		fail(EINVAL, "the tar stream has a member without a name");
	finish_dirs(path);
	if (type == '5') {
		unpack_dir(m, path);
		return;
	}
	if (type == '1')	/* before the path may go: it may be a link to itself */
		resolve(m->link, target);
	if (type == '1' && !strcmp(target, path))
		return;
	if (unlinkat(base, path, 0) && errno != ENOENT)
		fail_at(path);
	switch (type) {
	case '0': case '7': case 0:
		unpack_file(m, path);
		return;
	case '1':
		if (linkat(base, target, base, path, 0))
			fail_at(path);
		return;
	case '2':
		if (symlinkat(m->link, base, path))
			fail_at(path);
		break;
	default:
		if (mknodat(base, path, kinds[type] | 0600,
			    makedev(get_number(header + MAJOR, 8), get_number(header + MINOR, 8))) ||
		    fchmodat(base, path, m->mode, 0))
			fail_at(path);
	}
	set_owner(path, m);
	utimensat(base, path, m->times, AT_SYMLINK_NOFOLLOW);
}

static void take_long_name(char *name, int64_t size)
{
	if (size < 1 || size > PATH_BYTES)
		fail(ENAMETOOLONG, "the tar stream has a name of %lld bytes", (long long)size);
	read_input(name, size);
	name[size - 1] = 0;
	skip_input((512 - size % 512) % 512);
}

static void make_base(const char *path)
{
	char part[PATH_BYTES];
	struct stat here, root;
	for (const char *p = path; *p;) {
		p += strspn(p, "/");
		p += strcspn(p, "/");
		snprintf(part, sizeof part, "%.*s", (int)(p - path), path);
		if (mkdir(part, 0755) && errno != EEXIST && errno != EISDIR && errno != EROFS)
			fail_at(part);
	}
	base = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	if (base < 0 || fstat(base, &here) || stat("/", &root))
		fail_at(path);
	base_is_root = here.st_dev == root.st_dev && here.st_ino == root.st_ino;
}

static void put(const char *path)
{
	static struct member m;
	uint8_t header[512];
	char sum[9];
	make_base(path);
	for (;;) {
		read_input(header, 512);
		if (!header[0] && checksum(header) == 8 * ' ')
			break;		/* the end; zeros may follow */
		snprintf(sum, sizeof sum, "%.8s", (char *)header + SUM);
		if (strtoul(sum, NULL, 8) != checksum(header))
			fail(EINVAL, "what came is no tar stream");
		int type = header[TYPE];
		int64_t size = m.has_size ? m.size : get_number(header + SIZE, 12);
		if (type == 'L' || type == 'K' || type == 'x' || type == 'g')
			size = get_number(header + SIZE, 12);
		if (size < 0 || size > INT64_MAX - 1024)
			fail(EINVAL, "the tar stream has a member of %lld bytes", (long long)size);
		if (type == 'L') {
			take_long_name(m.name, size);
			m.has_name = true;
			continue;
		}
		if (type == 'K') {
			take_long_name(m.link, size);
			m.has_link = true;
			continue;
		}
		if (type == 'x') {
			if (size >= (int64_t)sizeof block)
				fail(EINVAL, "the tar stream has an extended header of %lld bytes",
				     (long long)size);
			read_input(block, size);
			block[size] = 0;
			take_records(&m, size);
			skip_input((512 - size % 512) % 512);
			continue;
		}
		if (type == 'g') {	/* remarks on all members: none matters here */
			skip_input((size + 511) / 512 * 512);
			continue;
		}
		if (!m.has_name && header[PREFIX] && !memcmp(header + MAGIC, "ustar", 6))
			sprintf(m.name, "%.155s/%.100s", header + PREFIX, header + NAME);
		else if (!m.has_name)
			sprintf(m.name, "%.100s", header + NAME);
		if (!m.has_link)
			sprintf(m.link, "%.100s", header + LINK);
		if (!m.has_mtime)
			m.times[1] = (struct timespec){ get_number(header + MTIME, 12), 0 };
		if (!m.has_uid)
			m.uid = get_number(header + UID, 8);
		if (!m.has_gid)
			m.gid = get_number(header + GID, 8);
		m.times[0] = m.times[1];
		m.mode = get_number(header + MODE, 8) & 07777;
		if ((type == 0 || type == '0') && m.name[0] && m.name[strlen(m.name) - 1] == '/')
			type = '5';	/* as before ustar */
		if (!memchr("01234567", type, 8) && type)
			fail(ENOTSUP, "%.900s: a tar member of type '%c'", m.name, type);
		bool is_file = type == '0' || type == '7' || !type;
		m.size = is_file ? size : 0;
		unpack_member(&m, type, header);
		if (!is_file && type != '1')
			skip_input((size + 511) / 512 * 512);
		memset(&m, 0, sizeof m);
	}
	finish_dirs(NULL);
	while (read_some(0, block, sizeof block, "the host"))
		;
}

/* ---- the other jobs of a child ---- */

static void read_file(const char *path)
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

static void write_file(const char *path, mode_t mode)
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

static bool is_same_variable(const char *a, const char *b)
{
	size_t n = strcspn(a, "=");
	return !strncmp(a, b, n) && b[n] == '=';
}

static void run(const uint8_t *payload)
{
	unsigned flags = get32(payload), argc = get16(payload + 8), envc = get16(payload + 10);
	char *text = (char *)payload + 12, *cwd = text;
	char **argv = calloc(argc + 1, sizeof *argv), **env = calloc(envc + 4, sizeof *env);
	unsigned n = 0;
	if (!argv || !env)
		fail(ENOMEM, "%s", strerror(ENOMEM));
	for (unsigned i = 0; i < argc; i++)
		argv[i] = text += strlen(text) + 1;
	for (unsigned i = 0; i < envc; i++)
		env[n++] = text += strlen(text) + 1;
	for (unsigned i = 0; i < 3 && !(flags & EXACT_ENV); i++) {
		bool is_given = false;
		for (unsigned k = 0; k < envc; k++)
			is_given |= is_same_variable(default_env[i], env[k]);
		if (!is_given)
			env[n++] = (char *)default_env[i];
	}
	if (*cwd && chdir(cwd))
		fail_at(cwd);
	environ = env;
	execvp(argv[0], argv);
	fail_at(argv[0]);
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

static void close_pipes(struct job *job)
{
	drop(&job->why);
	drop(&job->input);
	drop(&job->outputs[0].fd);
	drop(&job->outputs[1].fd);
}

static _Noreturn void child(int kind, const uint8_t *payload, int pipes[4][2])
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
	case WRITE: write_file((const char *)payload + 4, get32(payload) & 07777); break;
	}
	_exit(0);
}

/* ---- frames to the host ---- */

static size_t room(void) { return sizeof out - (out_end - out_first); }

/* Where the payload of the next frame belongs; there is room for it. */
static uint8_t *next_payload(size_t size)
{
	if (sizeof out - out_end < HEADER + size) {
		memmove(out, out + out_first, out_end - out_first);
		out_end -= out_first;
		out_first = 0;
	}
	return out + out_end + HEADER;
}

static void put_frame(int type, int stream, uint32_t id, size_t size)
{
	uint8_t *p = out + out_end;
	put32(p, size);
	put16(p + 4, type);
	put16(p + 6, stream);
	put32(p + 8, id);
	out_end += HEADER + size;
}

static void put_exit(uint32_t id, int end, bool is_timed_out, uint32_t value, const char *text)
{
	size_t length = least(strlen(text), MAX_TEXT);
	uint8_t *p = next_payload(8 + length);
	p[0] = end;
	p[1] = is_timed_out;
	put16(p + 2, 0);
	put32(p + 4, value);
	memcpy(p + 8, text, length);
	put_frame(EXIT, 0, id, 8 + length);
}

static void put_hello(void)
{
	struct utsname kernel;
	uint8_t *p = next_payload(16 + MAX_TEXT);
	memcpy(p, "PYVMMAGT", 8);
	put16(p + 8, VERSION);
	put16(p + 10, MAX_JOBS);
	put32(p + 12, WINDOW);
	uname(&kernel);
	snprintf((char *)p + 16, MAX_TEXT, "pyvmm-agent %d on %s %s %s", VERSION, kernel.sysname,
		 kernel.release, kernel.machine);
	put_frame(HELLO, 0, 0, 16 + strlen((char *)p + 16));
}

/* ---- jobs ---- */

static void signal_job(struct job *job, int number)
{
	if (job->kind != RUN)
		number = SIGKILL;
	job->is_killed |= number == SIGKILL;
	if (!job->pid) {	/* it has ended: nobody waits for what it left */
		drop(&job->outputs[0].fd);
		drop(&job->outputs[1].fd);
	} else if (kill(-job->pid, number)) {	/* it has not made its group yet */
		kill(job->pid, number);
	}
}

static void free_job(struct job *job)
{
	close_pipes(job);
	free(job->waiting);
	job->waiting = NULL;
	job->count = 0;
	job->id = 0;
	job->is_used = job->pid != 0;
}

static void abandon_all(void)
{
	for (struct job *job = jobs; job < jobs + SLOTS; job++)
		if (job->is_used && job->id) {
			signal_job(job, SIGKILL);
			free_job(job);
		}
}

static struct job *find(uint32_t id)
{
	for (struct job *job = jobs; id && job < jobs + SLOTS; job++)
		if (job->is_used && job->id == id)
			return job;
	return NULL;
}

static void start_job(int kind, uint32_t id, const uint8_t *payload)
{
	int pipes[4][2] = { { -1, -1 }, { -1, -1 }, { -1, -1 }, { -1, -1 } };
	struct job *job = NULL;
	int count = 0, error = 0;
	uint32_t limit_ms = kind == RUN ? get32(payload + 4) : 0;
	for (struct job *j = jobs; j < jobs + SLOTS; j++) {
		count += j->is_used && j->id;
		if (!j->is_used)
			job = j;
	}
	if (!job || count >= MAX_JOBS) {
		put_exit(id, FAILED, false, EAGAIN, "too many jobs at a time");
		return;
	}
	for (int i = 0; i < 4 && !error; i++)
		if (pipe2(pipes[i], O_CLOEXEC))
			error = errno;
	pid_t pid = error ? -1 : fork();
	if (pid == 0)
		child(kind, payload, pipes);
	if (pid < 0) {
		error = error ? error : errno;
		for (int i = 0; i < 8; i++)
			drop(&pipes[i / 2][i % 2]);
		put_exit(id, FAILED, false, error, strerror(error));
		return;
	}
	for (int i = 0; i < 4; i++) {
		drop(&pipes[i][i > 0]);
		fcntl(pipes[i][i == 0 ? 1 : 0], F_SETFL, O_NONBLOCK);
	}
	memset(job, 0, sizeof *job);
	job->is_used = true;
	job->id = id;
	job->kind = kind;
	job->pid = pid;
	job->until_ms = limit_ms ? now_ms() + limit_ms : 0;
	job->why = pipes[3][0];
	job->input = pipes[0][1];
	job->has_input = kind == PUT || kind == WRITE || (kind == RUN && get32(payload) & HAS_INPUT);
	if (!job->has_input)
		drop(&job->input);
	for (int i = 0; i < 2; i++)
		job->outputs[i] = (struct output){ pipes[i + 1][0], WINDOW, -1, false };
	if (kind != RUN) {	/* only a command has a standard error, and PUT and WRITE give nothing */
		job->outputs[1].is_told = true;
		drop(&job->outputs[1].fd);
		if (job->has_input) {
			job->outputs[0].is_told = true;
			drop(&job->outputs[0].fd);
		}
	}
}

static void reap(struct job *job)
{
	if (!job->pid || waitpid(job->pid, &job->status, WNOHANG) <= 0)
		return;
	job->pid = 0;
	job->until_ms = 0;
	if (!job->id) {
		free_job(job);
		return;
	}
	/* Whatever a process that lives on writes into the pipes from here is not the command's. */
	for (int i = 0; i < 2; i++) {
		struct output *o = &job->outputs[i];
		if (o->fd >= 0 && (ioctl(o->fd, FIONREAD, &o->left) || o->left <= 0))
			drop(&o->fd);
	}
	drop(&job->input);
}

static void tell_exit(struct job *job)
{
	char message[4 + MAX_TEXT + 1];
	ssize_t n = read(job->why, message, sizeof message - 1);
	bool is_signal = WIFSIGNALED(job->status);
	int value = is_signal ? WTERMSIG(job->status) : WEXITSTATUS(job->status);
	if (n >= 4) {
		message[n] = 0;
		put_exit(job->id, FAILED, false, get32((uint8_t *)message), message + 4);
	} else if (job->kind == RUN) {
		put_exit(job->id, is_signal ? SIGNALLED : EXITED, job->is_timed_out, value, "");
	} else if (is_signal && job->is_killed) {
		put_exit(job->id, FAILED, false, ECANCELED, "the host ended it");
	} else if (is_signal || value) {
		snprintf(message, sizeof message, "its process died: %s %d",
			 is_signal ? "signal" : "status", value);
		put_exit(job->id, FAILED, false, EIO, message);
	} else {
		put_exit(job->id, EXITED, false, 0, "");
	}
	free_job(job);
}

/* Input: from the host to the job. */
static void pump_input(struct job *job)
{
	while (job->count && job->input >= 0) {
		size_t size = least(job->count, WINDOW - job->first);
		ssize_t n = write(job->input, job->waiting + job->first, size);
		if (n < 0 && (errno == EAGAIN || errno == EINTR))
			break;
		if (n < 0) {	/* it reads no more */
			drop(&job->input);
			break;
		}
		job->first = (job->first + n) % WINDOW;
		job->count -= n;
		job->returnable += n;
	}
	if (job->input < 0) {
		job->returnable += job->count;
		job->count = 0;
	} else if (job->is_input_over && !job->count) {
		drop(&job->input);
	}
	if (job->returnable >= WINDOW / 4 && room() >= RESERVE) {
		put32(next_payload(4), job->returnable);
		put_frame(CREDIT, 0, job->id, 4);
		job->unreturned -= job->returnable;
		job->returnable = 0;
	}
}

static bool wants_output(const struct output *o)
{
	return o->fd >= 0 && o->credit && room() >= CHUNK + HEADER + RESERVE;
}

/* Output: one piece at a time, so that all jobs take turns. */
static void pump_output(struct job *job, int stream)
{
	struct output *o = &job->outputs[stream - 1];
	if (wants_output(o)) {
		uint8_t *p = next_payload(CHUNK);
		size_t size = least(least(CHUNK, o->credit), o->left >= 0 ? (size_t)o->left : CHUNK);
		ssize_t n = read(o->fd, p, size);
		if (n > 0) {
			put_frame(DATA, stream, job->id, n);
			o->credit -= n;
			if (o->left >= 0)
				o->left -= n;
		}
		if (n == 0 || o->left == 0 || (n < 0 && errno != EAGAIN && errno != EINTR))
			drop(&o->fd);
	}
	if (o->fd < 0 && !o->is_told && room() >= RESERVE) {
		next_payload(0);
		put_frame(DATA, stream, job->id, 0);
		o->is_told = true;
	}
}

static void pump(struct job *job)
{
	reap(job);
	if (!job->is_used || !job->id)
		return;
	if (job->until_ms && job->pid && now_ms() >= job->until_ms) {
		job->is_timed_out = true;
		job->until_ms = 0;
		signal_job(job, SIGKILL);
	}
	pump_input(job);
	pump_output(job, 1);
	pump_output(job, 2);
	if (!job->pid && job->outputs[0].is_told && job->outputs[1].is_told && room() >= RESERVE)
		tell_exit(job);
}

/* ---- frames of the host: each returns NULL, or how it breaks the protocol ---- */

static const char *take_data(uint32_t id, int stream, const uint8_t *data, size_t size)
{
	struct job *job = find(id);
	if (!job)
		return NULL;	/* it has ended, and the host could not know */
	if (stream || !job->has_input)
		return "data for a job without that stream";
	if (job->is_input_over)
		return "data behind the end of the input";
	if (size > WINDOW - job->unreturned)
		return "more data than it had credit for";
	job->unreturned += size;
	job->is_input_over = !size;
	if (job->input >= 0 && size && !job->waiting && !(job->waiting = malloc(WINDOW))) {
		complain("no memory for the input of a command");
		signal_job(job, SIGKILL);
		drop(&job->input);
	}
	if (job->input < 0) {
		job->returnable += size;
		return NULL;
	}
	for (size_t done = 0, n; done < size; done += n) {
		uint32_t end = (job->first + job->count) % WINDOW;
		n = least(size - done, WINDOW - end);
		memcpy(job->waiting + end, data + done, n);
		job->count += n;
	}
	return NULL;
}

static const char *take_credit(uint32_t id, int stream, uint32_t count)
{
	struct job *job = find(id);
	if (!job)
		return NULL;
	if (stream < 1 || stream > 2 || count > WINDOW - job->outputs[stream - 1].credit)
		return "more credit than was used";
	job->outputs[stream - 1].credit += count;
	return NULL;
}

static const char *take_start(int kind, uint32_t id, const uint8_t *payload, size_t size)
{
	size_t fixed = kind == RUN ? 12 : kind == WRITE ? 4 : 0, texts = 1, zeros = 0;
	static uint8_t path[MAX_PAYLOAD + 1];
	if (!id || find(id))
		return "a job with an id that is taken";
	if (size <= fixed)
		return "a job without a name";
	if (kind != RUN) {
		if (memchr(payload + fixed, 0, size - fixed) || size - fixed >= PATH_BYTES ||
		    payload[fixed] != '/')
			return "a path that is none";
		memcpy(path, payload, size);
		path[size] = 0;
		start_job(kind, id, path);
		return NULL;
	}
	texts += get16(payload + 8) + get16(payload + 10);
	for (size_t i = fixed; i < size; i++)
		zeros += !payload[i];
	if (!get16(payload + 8) || texts != zeros || payload[size - 1])
		return "a command whose texts are not complete";
	start_job(kind, id, payload);
	return NULL;
}

static const char *take(int type, int stream, uint32_t id, const uint8_t *payload, size_t size)
{
	struct job *job;
	switch (type) {
	case DATA: return take_data(id, stream, payload, size);
	case CREDIT: return size == 4 ? take_credit(id, stream, get32(payload)) : "CREDIT";
	case RUN: case PUT: case GET: case READ: case WRITE:
		return take_start(type, id, payload, size);
	case KILL:
		if (size != 4 || !get32(payload) || get32(payload) > LAST_SIGNAL)
			return "KILL without a signal";
		if ((job = find(id)))
			signal_job(job, get32(payload));
		return NULL;
	case PING:
		if (size > MAX_PING)
			return "a long PING";
		memcpy(next_payload(size), payload, size);
		put_frame(PONG, 0, 0, size);
		return NULL;
	}
	return "an unknown frame";
}

/* Drops what comes before START: it was meant for an agent before us. */
static void find_start(void)
{
	static const uint8_t begins[] = "\x10\0\0\0\0\0\0\0PYVMMHST";
	uint8_t *p = in_count > 4 ? memmem(in + 4, in_count - 4, begins, 16) : NULL;
	size_t gone = p ? (size_t)(p - in - 4) : in_count > 19 ? in_count - 19 : 0;
	memmove(in, in + gone, in_count -= gone);
	if (p && in_count >= HEADER + 10) {
		is_started = get32(in) == 10;
		gone = HEADER + 10;
		memmove(in, in + gone, in_count -= gone);
	}
}

/* Takes the whole frames that came, as long as there is room for answers. */
static const char *take_frames(void)
{
	const char *problem = NULL;
	size_t at = 0;
	if (!is_started)
		find_start();
	while (is_started && !problem && in_count - at >= HEADER && room() >= RESERVE) {
		uint8_t *p = in + at;
		size_t size = get32(p);
		if (size > MAX_PAYLOAD)
			return "a frame that is too long";
		if (in_count - at < HEADER + size)
			break;
		problem = take(get16(p + 4), get16(p + 6), get32(p + 8), p + HEADER, size);
		at += HEADER + size;
	}
	memmove(in, in + at, in_count -= at);
	return problem;
}

/* ---- the loop ---- */

static bool flush_port(void)
{
	while (out_first < out_end) {
		ssize_t n = write(port, out + out_first, out_end - out_first);
		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0)
			return errno == EAGAIN;
		out_first += n;
	}
	out_first = out_end = 0;
	return true;
}

static void watch(struct pollfd *list, int *count, int fd, short events)
{
	if (fd >= 0)
		list[(*count)++] = (struct pollfd){ fd, events, 0 };
}

/* Serves the port until its host goes away or breaks the protocol. */
static void serve(void)
{
	struct pollfd list[1 + 3 * SLOTS];
	sigset_t none;
	const char *problem = NULL;
	unsigned turn = 0;
	bool was_full = false;
	sigemptyset(&none);
	in_count = out_first = out_end = 0;
	is_started = false;
	put_hello();
	while (flush_port()) {
		int count = 0;
		int64_t until_ms = INT64_MAX, wait_ms;
		/* Something may have waited for the room that there is now. */
		if (was_full && room() >= CHUNK + HEADER + RESERVE)
			until_ms = 0;
		watch(list, &count, port, (in_count < sizeof in ? POLLIN : 0) |
		      (out_end > out_first ? POLLOUT : 0));
		for (struct job *job = jobs; job < jobs + SLOTS; job++) {
			if (!job->is_used || !job->id)
				continue;
			if (job->count)
				watch(list, &count, job->input, POLLOUT);
			for (int i = 0; i < 2; i++)
				if (wants_output(&job->outputs[i]))
					watch(list, &count, job->outputs[i].fd, POLLIN);
			if (job->until_ms && job->until_ms < until_ms)
				until_ms = job->until_ms;
		}
		wait_ms = until_ms - now_ms();
		if (wait_ms < 0)
			wait_ms = 0;
		struct timespec wait = { wait_ms / 1000, wait_ms % 1000 * 1000000 };
		if (ppoll(list, count, until_ms == INT64_MAX ? NULL : &wait, &none) < 0 &&
		    errno != EINTR)
			break;
		if (list[0].revents & POLLIN) {
			ssize_t n = read(port, in + in_count, sizeof in - in_count);
			if (n == 0 || (n < 0 && errno != EAGAIN && errno != EINTR))
				break;
			in_count += n > 0 ? n : 0;
		} else if (list[0].revents & (POLLHUP | POLLERR | POLLNVAL)) {
			break;
		}
		if ((problem = take_frames())) {
			complain("the host broke the protocol: %s", problem);
			break;
		}
		for (unsigned i = 0; i < SLOTS; i++)
			if (jobs[(turn + i) % SLOTS].is_used)
				pump(&jobs[(turn + i) % SLOTS]);
		turn++;
		was_full = room() < CHUNK + HEADER + RESERVE;
	}
	abandon_all();
}

static void ignore_signal(int number) { (void)number; }

static void set_signals(void)
{
	struct sigaction quiet = { .sa_handler = ignore_signal }, none = { .sa_handler = SIG_IGN };
	sigset_t children;
	sigaction(SIGCHLD, &quiet, NULL);
	sigaction(SIGPIPE, &none, NULL);
	sigaction(SIGHUP, &none, NULL);
	sigaction(SIGINT, &none, NULL);
	sigemptyset(&children);
	sigaddset(&children, SIGCHLD);
	sigprocmask(SIG_BLOCK, &children, NULL);	/* but in ppoll */
	umask(022);
}

/* ---- the port, and process 1 ---- */

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

/* True once systemd answers at its own socket, as it does for systemctl: the file is there, and
 * connections are queued, long before its event loop runs. */
static bool systemd_answers(int root)
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

static _Noreturn void be_daemon(dev_t initramfs)
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

static void start_from_initramfs(char *first_argument)
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
