/* Frames to the host, and the buffer where they wait. */
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/utsname.h>
#include <unistd.h>
#include "agent.h"

int port = -1;

static uint8_t out[4 * CHUNK];
static size_t out_first, out_end;

size_t room(void) { return sizeof out - (out_end - out_first); }

/* Where the payload of the next frame belongs; there is room for it. */
uint8_t *next_payload(size_t size)
{
	if (sizeof out - out_end < HEADER + size) {
		memmove(out, out + out_first, out_end - out_first);
		out_end -= out_first;
		out_first = 0;
	}
	return out + out_end + HEADER;
}

void put_frame(int type, int stream, uint32_t id, size_t size)
{
	uint8_t *p = out + out_end;
	put32(p, size);
	put16(p + 4, type);
	put16(p + 6, stream);
	put32(p + 8, id);
	out_end += HEADER + size;
}

void put_exit(uint32_t id, int end, bool is_timed_out, uint32_t value, const char *text)
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

/* The first frame, for a host that has heard nothing yet. */
void put_hello(void)
{
	struct utsname kernel;
	uint8_t *p;
	out_first = out_end = 0;
	p = next_payload(16 + MAX_TEXT);
	memcpy(p, "PYVMMAGT", 8);
	put16(p + 8, VERSION);
	put16(p + 10, MAX_JOBS);
	put32(p + 12, WINDOW);
	uname(&kernel);
	snprintf((char *)p + 16, MAX_TEXT, "pyvmm-agent %d on %s %s %s", VERSION, kernel.sysname,
		 kernel.release, kernel.machine);
	put_frame(HELLO, 0, 0, 16 + strlen((char *)p + 16));
}

bool is_flushed(void) { return out_end == out_first; }

bool flush_port(void)
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
