/* A file or a directory as a tar stream, to the host. */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <unistd.h>
#include "agent.h"
#include "tar.h"

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

void get(const char *path)
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
