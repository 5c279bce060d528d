// SPDX-License-Identifier: GPL-2.0-only
/*
 * Pages of kernel code for place.c, which puts bytes into them in the file of
 * the module before it loads it. In each of them one instruction is executed,
 * a return in its middle, in the order that the parameter "order" gives.
 */
#include <linux/linkage.h>
#include <linux/module.h>

#define PLACE_PAGES 16
#define PLACE_PAGE 4096
#define PLACE_ENTRY 2048

static int order[PLACE_PAGES];
static int count;
module_param_array(order, int, &count, 0444);
MODULE_PARM_DESC(order, "pages to be run");

static int executed;
module_param(executed, int, 0444);
MODULE_PARM_DESC(executed, "how many of them have run");

extern char virtav_place_pages[];

asm(".pushsection .text.virtav_place, \"ax\", @progbits\n\t"
    ".balign 4096\n"
    "virtav_place_pages:\n\t"
    ".ascii \"VIRTAV-PLACE-HERE\"\n\t"
    ".fill 2048 - (. - virtav_place_pages), 1, 0xcc\n\t"
    "ret\n\t"
    ".fill 4096 - (. - virtav_place_pages), 1, 0xcc\n\t"
    ".rept 15\n\t"
    ".fill 2048, 1, 0xcc\n\t"
    "ret\n\t"
    ".fill 2047, 1, 0xcc\n\t"
    ".endr\n\t"
    ".popsection");

static int __init virtav_place_init(void)
{
	int i;

	for (i = 0; i < count; i++) {
		((void (*)(void))(virtav_place_pages +
				  order[i] % PLACE_PAGES * PLACE_PAGE +
				  PLACE_ENTRY))();
		executed++;
	}
	return 0;
}
module_init(virtav_place_init);

static void __exit virtav_place_exit(void)
{
}
module_exit(virtav_place_exit);

MODULE_DESCRIPTION("VirtAV self-test: pages of kernel code with any content");
MODULE_LICENSE("GPL");
