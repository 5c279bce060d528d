// SPDX-License-Identifier: Apache-2.0
/*
 * Puts bytes where a test wants them in pages of a process, or of the kernel,
 * and has the pages run. Of each page only one instruction is ever executed, a
 * return in its middle, whatever else it holds.
 *
 *   place WORD...
 *
 * A process has 16 pages one after the other, which lie in no order in physical
 * memory. The words are done in turn:
 *
 *   pOFFSET:HEX  put bytes there
 *   rPAGE        make a page read-only data
 *   xPAGE        run a page
 *   sMS          sleep
 *   /            go on in another process; those before live on till the end
 *   k            first word: the pages are those of a kernel module; nothing
 *                but p and then x may follow
 *   f            first word: the pages are those of a file, as the last such
 *                process left them
 *
 * It prints the lines that selftest prints, for the case "place"; executed=1
 * tells that all was done. The status is that of the first process that did
 * not end well.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <termios.h>
#include <unistd.h>

#define PAGE 4096
#define PAGES 16
#define STRIDE 7		/* from a page to the next one in the file */
#define ENTRY 2048		/* of the instruction in its page */
#define EXIT_SETUP 71
#define PROCESSES 8

#define MODULE "virtav_place"
#define MODULE_FILE "/lib/modules/" MODULE ".ko"
#define EXECUTED "/sys/module/" MODULE "/parameters/executed"
/* What the module's pages begin with in its file. */
#define MARK "VIRTAV-PLACE-HERE"

/* What pages come from; NULL: they are new. */
static const char *file;
static unsigned char *pages;

static void __attribute__((format(printf, 1, 2))) say(const char *format, ...)
{
	char line[512];
	va_list arguments;
	int length;

	va_start(arguments, format);
	length = vsnprintf(line, sizeof(line) - 1, format, arguments);
	va_end(arguments);
	line[length++] = '\n';
	if (write(STDOUT_FILENO, line, length) == length)
		tcdrain(STDOUT_FILENO);
}

static void __attribute__((noreturn)) give_up(const char *what)
{
	say("VIRTAV-ERROR %s: %s", what, strerror(errno));
	_exit(EXIT_SETUP);
}

static void make_pages(void)
{
	int fd = file ? open(file, O_RDWR | O_CREAT, 0600)
		      : memfd_create("pages", 0);

	if (fd < 0 || ftruncate(fd, PAGES * PAGE) != 0)
		give_up("memfd");
	pages = mmap(NULL, PAGES * PAGE, PROT_NONE,
		     MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (pages == MAP_FAILED)
		give_up("addresses");
	for (int i = 0; i < PAGES; i++) {
		unsigned char *page = mmap(pages + i * PAGE, PAGE,
					   PROT_READ | PROT_WRITE | PROT_EXEC,
					   MAP_SHARED | MAP_FIXED, fd,
					   (i * STRIDE) % PAGES * PAGE);

		if (page == MAP_FAILED)
			give_up("pages");
	}
	close(fd);
}

static void put(const char *word)
{
	char *hex;
	unsigned long offset = strtoul(word, &hex, 0);
	unsigned int byte;

	for (hex++; sscanf(hex, "%2x", &byte) == 1; hex += 2) {
		if (offset >= PAGES * PAGE)
			give_up("offset");
		pages[offset++] = byte;
	}
}

static void run_page(int page)
{
	/* A page that is written is fetched anew. */
	if (pages[page * PAGE + ENTRY] != 0xc3)
		pages[page * PAGE + ENTRY] = 0xc3;	/* ret */
	((void (*)(void))(pages + page * PAGE + ENTRY))();
}

/* Does words up to the next "/"; returns where it ended. */
static char **obey(char **words)
{
	for (; *words && strcmp(*words, "/") != 0; words++) {
		int number = atoi(*words + 1);

		switch (**words) {
		case 'p':
			put(*words + 1);
			break;
		case 'r':
			mprotect(pages + number * PAGE, PAGE, PROT_READ);
			break;
		case 'x':
			run_page(number);
			break;
		case 's':
			usleep(number * 1000);
			break;
		default:
			give_up(*words);
		}
	}
	return words;
}

/* One process after the other; returns the status of the first bad one. */
static int in_processes(char **words)
{
	pid_t children[PROCESSES];
	int count = 0, worst = 0;

	do {
		int done[2];
		char byte;

		if (*words && strcmp(*words, "/") == 0)
			words++;
		if (count == PROCESSES || pipe(done) != 0)
			give_up("processes");
		children[count] = fork();
		if (children[count] < 0)
			give_up("fork");
		if (children[count] == 0) {
			close(done[0]);
			make_pages();
			obey(words);
			if (write(done[1], "", 1) == 1)
				pause();
			_exit(EXIT_SETUP);
		}
		count++;
		close(done[1]);
		/* Nothing is written by one that was killed. */
		if (read(done[0], &byte, 1) != 1)
			worst = 1;
		close(done[0]);
		while (*words && strcmp(*words, "/") != 0)
			words++;
	} while (*words && !worst);

	for (int i = 0; i < count; i++) {
		int status;

		if (!worst || i < count - 1)
			kill(children[i], SIGKILL);
		waitpid(children[i], &status, 0);
		if (worst && i == count - 1)
			worst = status;
	}
	return worst;
}

/* Loads the module with the words put into its pages. */
static int in_kernel(char **words)
{
	char order[256] = "order=";
	int count = 0, fd, status = 0;
	struct stat stat;
	unsigned char *image;
	pid_t child;

	fd = open(MODULE_FILE, O_RDONLY);
	if (fd < 0 || fstat(fd, &stat) != 0)
		give_up(MODULE_FILE);
	image = mmap(NULL, stat.st_size, PROT_READ | PROT_WRITE, MAP_PRIVATE,
		     fd, 0);
	if (image == MAP_FAILED)
		give_up(MODULE_FILE);
	pages = memmem(image, stat.st_size, MARK, strlen(MARK));
	if (!pages)
		give_up("mark");
	memset(pages, 0xcc, strlen(MARK));
	for (; *words; words++) {
		if (**words == 'p')
			put(*words + 1);
		else
			snprintf(order + strlen(order), 8, "%s%d",
				 count++ ? "," : "", atoi(*words + 1));
	}
	/* An oops ends the process that ran into it. */
	child = fork();
	if (child < 0)
		give_up("fork");
	if (child == 0) {
		if (syscall(SYS_init_module, image, stat.st_size, order) != 0)
			give_up("init_module");
		_exit(0);
	}
	waitpid(child, &status, 0);
	fd = open(EXECUTED, O_RDONLY);
	if (fd < 0 || read(fd, order, sizeof(order)) < 1 ||
	    atoi(order) != count)
		status = status ? status : EXIT_SETUP << 8;
	close(fd);
	syscall(SYS_delete_module, MODULE, O_NONBLOCK);
	return status;
}

int main(int count, char **words)
{
	int status;

	if (count < 2)
		give_up("words");
	say("VIRTAV-CASE place begin");
	if (strcmp(words[1], "k") == 0) {
		status = in_kernel(words + 2);
	} else if (strcmp(words[1], "f") == 0) {
		file = "/pages";
		status = in_processes(words + 2);
	} else {
		status = in_processes(words + 1);
	}
	say("VIRTAV-CASE place executed=%d status=%s:%d", status == 0,
	    WIFSIGNALED(status) ? "signal" : "exit",
	    WIFSIGNALED(status) ? WTERMSIG(status) : WEXITSTATUS(status));
	return 0;
}
