/* Shared by all files of the agent: the protocol's numbers, a job, and each file's functions. */
#ifndef AGENT_H
#define AGENT_H

#include <fcntl.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>
enum {
	VERSION = 2, HEADER = 12, MAX_PAYLOAD = 65536, MAX_JOBS = 16, WINDOW = 262144,
	MAX_TEXT = 1024, MAX_PING = 64, LAST_SIGNAL = 64, PATH_BYTES = 4096,
	SLOTS = 2 * MAX_JOBS,	/* jobs of a host that went away stay until their process ends */
	CHUNK = 32768 - HEADER,	/* a virtio port takes 32 KiB a call */
	RESERVE = 4096,		/* what answers to one frame, and an EXIT, need at most */
};
enum { HELLO = 1, DATA, CREDIT, EXIT, PONG,
       START = 16, RUN, PUT, GET, READ, WRITE, KILL, PING, CLONE };
enum { HAS_INPUT = 1, EXACT_ENV = 2 };
enum { SET_CLOCK = 1, SEED_BYTES = 64, CLONE_BYTES = 4 + 4 + 8 + 16 + SEED_BYTES };
enum { RESEEDED = 1, CLOCK_SET = 2, HAS_HOOK = 4 };
enum { EXITED, SIGNALLED, FAILED };

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

/* util.c: small things, the kernel's log and the kernel's file systems */

extern bool stays_here;		/* --fd: commands run in our own root */
extern int proc_fd, sys_fd, kmsg_fd;
extern const char *proc_path, *sys_path;

static inline uint16_t get16(const uint8_t *p) { return p[0] | p[1] << 8; }
static inline uint32_t get32(const uint8_t *p) { return get16(p) | (uint32_t)get16(p + 2) << 16; }
static inline void put16(uint8_t *p, uint32_t v) { p[0] = v; p[1] = v >> 8; }
static inline void put32(uint8_t *p, uint32_t v) { put16(p, v); put16(p + 2, v >> 16); }
static inline size_t least(size_t a, size_t b) { return a < b ? a : b; }

int64_t now_ms(void);
void nap(int ms);
void drop(int *fd);
void complain(const char *format, ...);
int open_kernel(int dir, const char *prefix, const char *rest, int flags);
int read_kernel(int dir, const char *prefix, const char *rest, char *text, size_t size);
void set_oom_score(const char *score);

/* child.c: a job's own process, which ends where one of these fails */

extern uint8_t block[MAX_PAYLOAD];	/* a child's buffer */

_Noreturn void child(int kind, const uint8_t *payload, int pipes[4][2]);
_Noreturn void fail(int error, const char *format, ...);
_Noreturn void fail_at(const char *path);
size_t read_some(int fd, void *data, size_t size, const char *path);
void write_all(int fd, const void *data, size_t size, const char *path);

/* clone.c, command.c, transfer.c, tar_read.c, tar_write.c: what a child does */

void be_clone(const uint8_t *payload);
void run(const uint8_t *payload);
void read_file(const char *path);
void write_file(const char *path, mode_t mode);
void put(const char *path);
void get(const char *path);

/* jobs.c */

extern struct job jobs[SLOTS];

/* A job with a standard error, a time limit and a status of its own. */
static inline bool is_command(int kind) { return kind == RUN || kind == CLONE; }

struct job *find(uint32_t id);
void start_job(int kind, uint32_t id, const uint8_t *payload);
void signal_job(struct job *job, int number);
void pump(struct job *job);
bool wants_output(const struct output *o);
void close_pipes(struct job *job);
void abandon_all(void);

/* frames.c: to the host */

extern int port;

void put_hello(void);
void put_frame(int type, int stream, uint32_t id, size_t size);
void put_exit(uint32_t id, int end, bool is_timed_out, uint32_t value, const char *text);
size_t room(void);
uint8_t *next_payload(size_t size);
bool is_flushed(void);
bool flush_port(void);

/* link.c, boot.c, systemd.c */

void serve(void);
void set_signals(void);
_Noreturn void be_daemon(dev_t initramfs);
void start_from_initramfs(char *first_argument);
bool systemd_answers(int root);

#endif
