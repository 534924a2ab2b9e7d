/*
 * pyvmm-scattered DEVICE BYTES COUNT...: write and read DEVICE through COUNT pieces of memory of
 * BYTES each, no two of them in neighbouring pages of RAM, and compare.  For each COUNT prints
 * "scattered COUNT BYTES", or ends with status 1 and what went wrong.
 *
 * Every other page of an area is used whose pages were all touched in order, in a shuffled order: so
 * the kernel can join no two pieces, and a piece is a segment of the request.
 */

#define _GNU_SOURCE
#include <err.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <stdio.h>
#include <unistd.h>

enum { PAGE = 4096, MOST = 1024 };

static uint32_t state = 1;

static uint32_t next_random(void)
{
	state = state * 1664525 + 1013904223;
	return state >> 8;
}

/* COUNT pieces of BYTES in AREA, in another order each time. */
static void choose(struct iovec *pieces, int count, size_t bytes, char *area)
{
	int order[MOST];

	for (int i = 0; i < MOST; i++) {
		int j = next_random() % (i + 1);
		order[i] = order[j];
		order[j] = i;
	}
	for (int i = 0; i < count; i++) {
		pieces[i].iov_base = area + (size_t)order[i] * 2 * PAGE;
		pieces[i].iov_len = bytes;
	}
}

static void check(const char *what, ssize_t done, size_t wanted)
{
	if (done < 0)
		err(1, "%s", what);
	if ((size_t)done != wanted)
		errx(1, "%s: %zd of %zu bytes", what, done, wanted);
}

int main(int argc, char **argv)
{
	static struct iovec pieces[MOST];
	char *area, *whole;
	size_t bytes;
	int fd;

	if (argc < 4)
		errx(2, "usage: %s DEVICE BYTES COUNT...", argv[0]);
	fd = open(argv[1], O_RDWR | O_DIRECT);
	if (fd < 0)
		err(1, "%s", argv[1]);
	bytes = atoi(argv[2]);
	if (!bytes || bytes > PAGE || bytes % 512)
		errx(2, "%s bytes: 512 to %d", argv[2], PAGE);
	area = mmap(NULL, 2 * MOST * PAGE, PROT_READ | PROT_WRITE,
		    MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
	whole = mmap(NULL, MOST * PAGE, PROT_READ | PROT_WRITE,
		     MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (area == MAP_FAILED || whole == MAP_FAILED)
		err(1, "mmap");
	for (int argument = 3; argument < argc; argument++) {
		int count = atoi(argv[argument]);
		size_t length = count * bytes;

		if (count < 1 || count > MOST)
			errx(2, "%s pieces: 1 to %d", argv[argument], MOST);
		choose(pieces, count, bytes, area);
		for (size_t i = 0; i < length; i += 4) {
			uint32_t word = next_random();
			memcpy(whole + i, &word, 4);
		}
		for (int i = 0; i < count; i++)
			memcpy(pieces[i].iov_base, whole + i * bytes, bytes);
		check("pwritev", pwritev(fd, pieces, count, 0), length);
		choose(pieces, count, bytes, area);
		for (int i = 0; i < count; i++)
			memset(pieces[i].iov_base, 0, bytes);
		check("preadv", preadv(fd, pieces, count, 0), length);
		for (int i = 0; i < count; i++)
			if (memcmp(pieces[i].iov_base, whole + i * bytes, bytes))
				errx(1, "piece %d of %d: other data", i, count);
		check("pread", pread(fd, area, bytes, length - bytes), bytes);
		if (memcmp(area, whole + length - bytes, bytes))
			errx(1, "the last of %d pieces: other data", count);
		printf("scattered %d %zu\n", count, bytes);
		fflush(stdout);
	}
	return 0;
}
