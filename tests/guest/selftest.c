// SPDX-License-Identifier: Apache-2.0
/*
 * Runs one case of the guest in a child process and tells how it ended:
 *
 *   VIRTAV-CASE name begin
 *   VIRTAV-CASE name executed=0|1 status=exit:N|signal:N [seconds=S]
 *
 * "executed" is a mark, one byte of memory shared with the child, that the
 * code under test leaves itself (for the kernel case: a module parameter). It
 * is never inferred from the status. What keeps a case from being run at all
 * is told as a VIRTAV-ERROR line.
 *
 * The runner's own text never holds the plain signature: pages that carry it
 * are stored encrypted.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096
#define MARK_FD 3		/* where page.S looks for the mark */
#define EXIT_SETUP 71		/* the case could not be set up */
#define EXIT_WRONG 72		/* the case ran and computed something wrong */

#define MODULE "virtav_selftest"
#define MODULE_FILE "/lib/modules/" MODULE ".ko"
#define MODULE_SYSFS "/sys/module/" MODULE

#define REWRITES 2000
#define EXECS 500
#define ROUNDS 1000000000u
#define ROUNDS_RESULT 0x9c3c3200u

typedef uint32_t function(uint32_t);

extern const unsigned char signed_page[PAGE], clean_page[PAGE];

static volatile unsigned char *mark;

/* One whole line in one write, on the wire before this returns. */
static void __attribute__((format(printf, 1, 2))) say(const char *format, ...)
{
	char line[512];
	va_list arguments;
	int length;

	va_start(arguments, format);
	length = vsnprintf(line, sizeof(line) - 1, format, arguments);
	va_end(arguments);
	if (length > (int)sizeof(line) - 2)
		length = sizeof(line) - 2;
	line[length++] = '\n';
	if (write(STDOUT_FILENO, line, length) == length)
		tcdrain(STDOUT_FILENO);
}

/* For the child: says what failed and ends it. */
static void __attribute__((noreturn)) give_up(const char *what)
{
	say("VIRTAV-ERROR %s: %s", what, strerror(errno));
	_exit(EXIT_SETUP);
}

static unsigned char *executable_page(void)
{
	unsigned char *page = mmap(NULL, PAGE, PROT_READ | PROT_WRITE | PROT_EXEC,
				   MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (page == MAP_FAILED)
		give_up("executable memory");
	return page;
}

/* The cipher of the stored pages: XOR with the high bytes of an LCG. */
static void decrypt(unsigned char *to, const unsigned char *from)
{
	uint32_t state = 0;

	for (int i = 0; i < PAGE; i++) {
		state = state * 1664525u + 1013904223u;
		to[i] = from[i] ^ (state >> 24);
	}
}

static void run_page(const unsigned char *stored)
{
	unsigned char *page = executable_page();

	decrypt(page, stored);
	((void (*)(void))page)();
}

static void run_clean(void)
{
	run_page(clean_page);
}

static void run_user_write(void)
{
	run_page(signed_page);
}

/* The page cache is told to forget the file: it is to come from the disk. */
static void run_program(const char *path)
{
	int fd = open(path, O_RDONLY | O_CLOEXEC);

	if (fd < 0)
		give_up(path);
	posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);
	execl(path, path, NULL);
	give_up(path);
}

static void run_file(void)
{
	run_program("/disk/file");
}

static void run_packed(void)
{
	run_program("/disk/packed");
}

static void run_kernel(void)
{
	int fd = open(MODULE_FILE, O_RDONLY | O_CLOEXEC);

	if (fd < 0 || syscall(SYS_finit_module, fd, "", 0) != 0)
		give_up(MODULE_FILE);
}

static void run_exec500(void)
{
	for (int i = 0; i < EXECS; i++) {
		int status;
		pid_t child = fork();

		if (child < 0)
			give_up("fork");
		if (child == 0) {
			execl("/bin/true", "true", NULL);
			_exit(EXIT_SETUP);
		}
		if (waitpid(child, &status, 0) != child || status != 0)
			_exit(EXIT_WRONG);
	}
	*mark = 1;
}

static void run_loop(void)
{
	uint32_t state = 0;

	for (uint32_t i = 0; i < ROUNDS; i++) {
		state = state * 1664525u + 1013904223u;
		__asm__ volatile("" : "+r" (state));
	}
	if (state != ROUNDS_RESULT)
		_exit(EXIT_WRONG);
	*mark = 1;
}

/* Rewrites an immediate of a function that lies in another page. */
static void run_smc(void)
{
	static const unsigned char code[] = {
		0xb8, 0, 0, 0, 0,	/* mov $0, %eax */
		0xc3,			/* ret */
	};
	unsigned char *page = executable_page();

	memcpy(page, code, sizeof(code));
	for (uint32_t i = 1; i <= REWRITES; i++) {
		memcpy(page + 1, &i, sizeof(i));
		if (((function *)page)(0) != i)
			_exit(EXIT_WRONG);
	}
	*mark = 1;
}

/* Runs code that counts in its own page. */
static void run_own(void)
{
	static const unsigned char code[] = {
		0xff, 0x05, 0x0b, 0, 0, 0,	/* incl counter(%rip) */
		0xff, 0xcf,			/* dec %edi */
		0x75, 0xf6,			/* jnz to the start */
		0x8b, 0x05, 0x01, 0, 0, 0,	/* mov counter(%rip), %eax */
		0xc3,				/* ret */
		0, 0, 0, 0,			/* counter, at 17 */
	};
	unsigned char *page = executable_page();

	memcpy(page, code, sizeof(code));
	if (((function *)page)(REWRITES) != REWRITES)
		_exit(EXIT_WRONG);
	*mark = 1;
}

static const struct test {
	const char *name;
	void (*run)(void);	/* in the child, which ends when it returns */
	int timed;
} tests[] = {
	{ "clean", run_clean, 0 },
	{ "user-write", run_user_write, 0 },
	{ "file", run_file, 0 },
	{ "packed", run_packed, 0 },
	{ "kernel", run_kernel, 0 },
	{ "exec500", run_exec500, 1 },
	{ "loop", run_loop, 1 },
	{ "smc", run_smc, 1 },
	{ "own", run_own, 1 },
};

#define TESTS (sizeof(tests) / sizeof(tests[0]))

/* The first word of a file in sysfs; empty if there is none. */
static const char *read_sysfs(const char *path)
{
	static char word[32];
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	ssize_t length = fd < 0 ? 0 : read(fd, word, sizeof(word) - 1);

	word[length > 0 ? length : 0] = 0;
	word[strcspn(word, "\n")] = 0;
	if (fd >= 0)
		close(fd);
	return word;
}

/* Unloads the module, if it is there; false if it cannot be unloaded. */
static int unload_module(void)
{
	return syscall(SYS_delete_module, MODULE, O_NONBLOCK) == 0 ||
	       errno == ENOENT;
}

static double now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return time.tv_sec + time.tv_nsec / 1e9;
}

static void share_mark(void)
{
	int fd = memfd_create("mark", 0);

	if (fd < 0 || ftruncate(fd, PAGE) != 0)
		give_up("memfd");
	mark = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (mark == MAP_FAILED)
		give_up("mark");
	if (fd != MARK_FD) {
		dup2(fd, MARK_FD);
		close(fd);
	}
}

static int run(const struct test *test)
{
	int is_kernel = test->run == run_kernel;
	int executed, status;
	char seconds[32] = "";
	double start;
	pid_t child;

	if (is_kernel && !unload_module()) {
		say("VIRTAV-ERROR kernel: the module of an earlier run is in "
		    "state '%s' and cannot be unloaded; boot the guest anew",
		    read_sysfs(MODULE_SYSFS "/initstate"));
		return EXIT_SETUP;
	}
	share_mark();
	say("VIRTAV-CASE %s begin", test->name);
	start = now();
	child = fork();
	if (child < 0)
		give_up("fork");
	if (child == 0) {
		test->run();
		_exit(0);
	}
	if (waitpid(child, &status, 0) != child)
		give_up("waitpid");
	if (test->timed)
		snprintf(seconds, sizeof(seconds), " seconds=%.6f",
			 now() - start);

	executed = *mark;
	if (is_kernel) {
		executed = strcmp(read_sysfs(MODULE_SYSFS
					     "/parameters/executed"), "1") == 0;
		unload_module();
	}
	say("VIRTAV-CASE %s executed=%d status=%s:%d%s", test->name, executed,
	    WIFSIGNALED(status) ? "signal" : "exit",
	    WIFSIGNALED(status) ? WTERMSIG(status) : WEXITSTATUS(status),
	    seconds);
	return 0;
}

int main(int count, char **arguments)
{
	for (size_t i = 0; i < TESTS; i++) {
		if (count < 2)
			say("%s", tests[i].name);
		else if (strcmp(arguments[1], tests[i].name) == 0)
			return run(&tests[i]);
	}
	if (count >= 2)
		say("VIRTAV-ERROR unknown case");
	return count < 2 ? 0 : EXIT_SETUP;
}
