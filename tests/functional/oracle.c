/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A TCG plugin that tells which bytes were translated: it appends the SHA-256
 * of each page that code was taken from to a file, at the time that it is.
 * QEMU holds the lock of the page then, so that nobody changes it meanwhile.
 *
 * What is used of QEMU's plugin API and of the GLib that QEMU is linked with
 * is declared here; neither needs to be installed to build this.
 */

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))
#define PAGE 4096

struct qemu_plugin_tb;
struct qemu_plugin_insn;
struct qemu_info_t;

void qemu_plugin_register_vcpu_tb_trans_cb(
	uint64_t id, void (*callback)(uint64_t, struct qemu_plugin_tb *));
size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *tb);
struct qemu_plugin_insn *qemu_plugin_tb_get_insn(
	const struct qemu_plugin_tb *tb, size_t index);
void *qemu_plugin_insn_haddr(const struct qemu_plugin_insn *insn);

enum { G_CHECKSUM_SHA256 = 2 };
char *g_compute_checksum_for_data(int type, const unsigned char *data,
				  size_t length);
void g_free(void *memory);

EXPORT int qemu_plugin_version = 4;
static FILE *out;

static void tell(const unsigned char *page)
{
	char *sum = g_compute_checksum_for_data(G_CHECKSUM_SHA256, page, PAGE);

	/* One call, as there may be many threads. */
	fprintf(out, "%s\n", sum);
	g_free(sum);
}

static void translated(uint64_t id, struct qemu_plugin_tb *tb)
{
	const unsigned char *last = NULL;

	(void)id;
	for (size_t i = 0; i < qemu_plugin_tb_n_insns(tb); i++) {
		uintptr_t address = (uintptr_t)qemu_plugin_insn_haddr(
			qemu_plugin_tb_get_insn(tb, i));
		const unsigned char *page =
			(const unsigned char *)(address & -(uintptr_t)PAGE);

		/* There is none for what is not RAM. */
		if (page && page != last)
			tell(page);
		last = page;
	}
}

EXPORT int qemu_plugin_install(uint64_t id, const struct qemu_info_t *info,
			       int argc, char **argv)
{
	(void)info;
	if (argc != 1 || strncmp(argv[0], "out=", 4))
		return -1;
	out = fopen(argv[0] + 4, "w");
	if (!out)
		return -1;
	qemu_plugin_register_vcpu_tb_trans_cb(id, translated);
	return 0;
}
