/*
 * For machines on which even root lacks CAP_SYS_RESOURCE (containers, mostly): CRIU asks for limits of
 * processes of other users, and the kernel refuses. This library, preloaded into CRIU, reads them from
 * /proc/PID/limits instead. On test hosts only: a real host has the capability.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>

/* In the order of the resources' numbers, see getrlimit(2) and fs/proc/base.c of the kernel. */
static const char *const NAMES[] = {
	"Max cpu time",	     "Max file size",	  "Max data size",	 "Max stack size",
	"Max core file size", "Max resident set",  "Max processes",	 "Max open files",
	"Max locked memory",  "Max address space", "Max file locks",	 "Max pending signals",
	"Max msgqueue size",  "Max nice priority", "Max realtime priority", "Max realtime timeout",
};
#define RESOURCES ((long)(sizeof(NAMES) / sizeof(NAMES[0])))

struct limit {
	uint64_t soft, hard;
};

static uint64_t value(const char *text)
{
	return strcmp(text, "unlimited") ? strtoull(text, NULL, 10) : ~0ULL;
}

static int read_limit(long pid, long resource, struct limit *limit)
{
	const char *name = NAMES[resource];
	char path[64], line[256], soft[64], hard[64];
	int found = 0;
	FILE *file;

	snprintf(path, sizeof(path), "/proc/%ld/limits", pid);
	file = fopen(path, "re");
	if (!file)
		return 0;
	while (!found && fgets(line, sizeof(line), file))
		found = !strncmp(line, name, strlen(name)) &&
			sscanf(line + strlen(name), " %63s %63s", soft, hard) == 2;
	fclose(file);
	if (found)
		*limit = (struct limit){ value(soft), value(hard) };
	return found;
}

/* CRIU calls prlimit by its number. */
long syscall(long number, ...)
{
	static long (*real)(long, ...);
	long a[6], result;
	va_list arguments;
	int i;

	if (!real)
		real = (long (*)(long, ...))dlsym(RTLD_NEXT, "syscall");
	va_start(arguments, number);
	for (i = 0; i < 6; i++)
		a[i] = va_arg(arguments, long);
	va_end(arguments);
	result = real(number, a[0], a[1], a[2], a[3], a[4], a[5]);
	if (number == SYS_prlimit64 && result == -1 && errno == EPERM && !a[2] && a[3] && a[1] >= 0 &&
	    a[1] < RESOURCES && read_limit(a[0], a[1], (struct limit *)a[3])) {
		errno = 0;
		return 0;
	}
	return result;
}
