/* This guest is a clone, or was rewound: new random numbers, the date, and the image's own hook. */
#define _GNU_SOURCE
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>
#include "agent.h"

/* As <linux/random.h> has them; musl comes without it. */
struct rand_pool_info {
	int bits, size;
	uint8_t bytes[SEED_BYTES];
};
#define RNDADDENTROPY _IOW('R', 3, int[2])
#define RNDRESEEDCRNG _IO('R', 7)

static const char hook[] = "/etc/pyvmm/clone";

/* True if the kernel's generator starts anew from seed, which nobody else has. */
static bool reseed(const uint8_t *seed)
{
	struct rand_pool_info pool = { 8 * SEED_BYTES, SEED_BYTES, { 0 } };
	int fd = open("/dev/urandom", O_RDONLY | O_CLOEXEC);
	memcpy(pool.bytes, seed, SEED_BYTES);
	bool is_done = fd >= 0 && !ioctl(fd, RNDADDENTROPY, &pool) && !ioctl(fd, RNDRESEEDCRNG);
	drop(&fd);
	return is_done;
}

/* True if the date is the host's, which was ns when it sent the notice.  That may have been some
 * time ago: a date that can be right is left alone, because KVM has brought it up to date better. */
static bool set_clock(uint64_t ns)
{
	struct timespec host = { ns / 1000000000, ns % 1000000000 }, now;
	if (!clock_gettime(CLOCK_REALTIME, &now) && now.tv_sec >= host.tv_sec - 1 &&
	    now.tv_sec <= host.tv_sec + 10)
		return true;
	return !clock_settime(CLOCK_REALTIME, &host);
}

/* Starts the hook with the clone's number in its environment, as RUN would. */
static void run_hook(const uint8_t *id)
{
	uint8_t payload[128] = { 0 };
	char *text = (char *)payload + 12 + 1;
	put16(payload + 8, 1);
	put16(payload + 10, 1);
	text = stpcpy(text, hook + stays_here) + 1;	/* below the working directory then */
	text += sprintf(text, "PYVMM_CLONE_ID=");
	for (int i = 0; i < 16; i++)
		text += sprintf(text, i == 4 || i == 6 || i == 8 || i == 10 ? "-%02x" : "%02x", id[i]);
	run(payload);
}

/* In a job's own process: says how it went in the first byte of the output, then is the hook. */
void be_clone(const uint8_t *payload)
{
	const uint8_t *id = payload + 16;
	uint64_t ns = get32(payload + 8) | (uint64_t)get32(payload + 12) << 32;
	struct stat st;
	bool is_set = get32(payload) & SET_CLOCK && set_clock(ns), is_reseeded = reseed(id + 16);
	int error = stat(hook + stays_here, &st) ? errno : 0;
	bool has_hook = error != ENOENT && error != ENOTDIR;
	uint8_t done = (is_reseeded ? RESEEDED : 0) | (is_set ? CLOCK_SET : 0) |
		       (has_hook ? HAS_HOOK : 0);
	write_all(1, &done, 1, "the host");
	if (!has_hook)
		return;
	if (error)
		fail(error, "%s: %s", hook, strerror(error));
	if (!S_ISREG(st.st_mode) || !(st.st_mode & S_IXUSR) || st.st_uid != geteuid() ||
	    st.st_mode & S_IWOTH || (st.st_mode & S_IWGRP && st.st_gid != getegid()))
		fail(EACCES, "%s: is no regular file that root owns and may execute, and nobody else "
		     "may write", hook);
	run_hook(id);
}
