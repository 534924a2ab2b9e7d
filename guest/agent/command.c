/* Becomes a command, in a job's own process. */
#define _GNU_SOURCE
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include "agent.h"

static const char *const default_env[] = {
	"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root", "TERM=linux",
};

static bool is_same_variable(const char *a, const char *b)
{
	size_t n = strcspn(a, "=");
	return !strncmp(a, b, n) && b[n] == '=';
}

void run(const uint8_t *payload)
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
