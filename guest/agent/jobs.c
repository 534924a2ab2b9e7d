/* Jobs: how each starts, what goes into it and comes out, how it ends. */
#define _GNU_SOURCE
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/wait.h>
#include <unistd.h>
#include "agent.h"

struct job jobs[SLOTS];

void close_pipes(struct job *job)
{
	drop(&job->why);
	drop(&job->input);
	drop(&job->outputs[0].fd);
	drop(&job->outputs[1].fd);
}

void signal_job(struct job *job, int number)
{
	if (!is_command(job->kind))
		number = SIGKILL;
	job->is_killed |= number == SIGKILL;
	if (!job->pid) {	/* it has ended; what it left is taken, unless nobody waits for it */
		if (number == SIGKILL) {
			drop(&job->outputs[0].fd);
			drop(&job->outputs[1].fd);
		}
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

void abandon_all(void)
{
	for (struct job *job = jobs; job < jobs + SLOTS; job++)
		if (job->is_used && job->id) {
			signal_job(job, SIGKILL);
			free_job(job);
		}
}

struct job *find(uint32_t id)
{
	for (struct job *job = jobs; id && job < jobs + SLOTS; job++)
		if (job->is_used && job->id == id)
			return job;
	return NULL;
}

void start_job(int kind, uint32_t id, const uint8_t *payload)
{
	int pipes[4][2] = { { -1, -1 }, { -1, -1 }, { -1, -1 }, { -1, -1 } };
	struct job *job = NULL;
	int count = 0, error = 0;
	uint32_t limit_ms = is_command(kind) ? get32(payload + 4) : 0;
	sigset_t all, before;
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
	/* The child ignores what we ignore, until it is itself: what the host sends it before that
	 * has to wait. */
	sigfillset(&all);
	sigprocmask(SIG_SETMASK, &all, &before);
	pid_t pid = error ? -1 : fork();
	if (pid == 0)
		child(kind, payload, pipes);
	if (pid < 0 && !error)
		error = errno;
	sigprocmask(SIG_SETMASK, &before, NULL);
	if (pid < 0) {
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
	if (!is_command(kind)) {	/* only it has a standard error, and PUT and WRITE give nothing */
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
	} else if (is_command(job->kind)) {
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

bool wants_output(const struct output *o)
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
		/* Of what an ended process left, another one may have taken some. */
		bool is_later = n < 0 && (errno == EINTR || (errno == EAGAIN && o->left < 0));
		if (o->left == 0 || (n <= 0 && !is_later))
			drop(&o->fd);
	}
	if (o->fd < 0 && !o->is_told && room() >= RESERVE) {
		next_payload(0);
		put_frame(DATA, stream, job->id, 0);
		o->is_told = true;
	}
}

void pump(struct job *job)
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
