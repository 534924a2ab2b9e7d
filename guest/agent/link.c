/* The link with the host: its frames, and the loop that serves it and all jobs. */
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>
#include "agent.h"

static uint8_t in[2 * (MAX_PAYLOAD + HEADER)];
static size_t in_count;
static bool is_started;		/* the host has said START */

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

static const char *take_clone(uint32_t id, const uint8_t *payload, size_t size)
{
	if (size != CLONE_BYTES || !id || get32(payload) > SET_CLOCK)
		return "CLONE";
	for (struct job *job = jobs; job < jobs + SLOTS; job++)
		if (job->is_used && job->id)
			return "CLONE behind a job";
	start_job(CLONE, id, payload);
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
	case CLONE: return take_clone(id, payload, size);
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

/* Drops what comes before START: it was meant for an agent before us.  True if there may be more
 * to find. */
static bool find_start(void)
{
	static const uint8_t begins[] = "\x10\0\0\0\0\0\0\0PYVMMHST";
	uint8_t *p = in_count > 4 ? memmem(in + 4, in_count - 4, begins, 16) : NULL;
	size_t gone = p ? (size_t)(p - in - 4) : in_count > 19 ? in_count - 19 : 0;
	memmove(in, in + gone, in_count -= gone);
	if (!p || in_count < HEADER + 10)
		return false;
	is_started = get32(in) == 10;
	gone = is_started ? HEADER + 10 : HEADER;	/* in a damaged one, START may begin early */
	memmove(in, in + gone, in_count -= gone);
	return !is_started;
}

/* Takes the whole frames that came, as long as there is room for answers. */
static const char *take_frames(void)
{
	const char *problem = NULL;
	size_t at = 0;
	while (!is_started && find_start())
		;
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

static void watch(struct pollfd *list, int *count, int fd, short events)
{
	if (fd >= 0)
		list[(*count)++] = (struct pollfd){ fd, events, 0 };
}

/* Serves the port until its host goes away or breaks the protocol. */
void serve(void)
{
	struct pollfd list[1 + 3 * SLOTS];
	sigset_t none;
	const char *problem = NULL;
	unsigned turn = 0;
	bool was_full = false;
	sigemptyset(&none);
	in_count = 0;
	is_started = false;
	put_hello();
	while (flush_port()) {
		int count = 0;
		int64_t until_ms = INT64_MAX, wait_ms;
		/* Something may have waited for the room that there is now. */
		if (was_full && room() >= CHUNK + HEADER + RESERVE)
			until_ms = 0;
		watch(list, &count, port, (in_count < sizeof in ? POLLIN : 0) |
		      (is_flushed() ? 0 : POLLOUT));
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

void set_signals(void)
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
