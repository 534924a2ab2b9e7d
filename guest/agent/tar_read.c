/* Unpacks a tar stream of the host's. */
#define _GNU_SOURCE
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <unistd.h>
#include "agent.h"
#include "tar.h"

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

void put(const char *path)
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
