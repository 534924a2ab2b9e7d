/* Paths below the directory where a tar stream is unpacked, and none that leads out of it. */
#define _GNU_SOURCE
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#include "agent.h"
#include "tar.h"

int base;
static bool base_is_root;

void make_base(const char *path)
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

/* The path below base of the member name, without symbolic links before its last part; makes
 * directories that are missing.  Links are followed as long as they stay below base. */
void resolve(const char *name, char *path)
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
