// SPDX-License-Identifier: GPL-2.0-only
/*
 * Ring-0 case: a function alone in its page, which carries the signature and
 * leaves the mark in the parameter "executed". The parameter is in sysfs
 * before the function runs, so it can be read if the function never returns.
 */
#include <linux/linkage.h>
#include <linux/module.h>

#include "signature.h"

int virtav_executed;
module_param_named(executed, virtav_executed, int, 0444);
MODULE_PARM_DESC(executed, "1 once the page with the signature has run");

asmlinkage void virtav_signed_page(void);

asm(".pushsection .text.virtav_signed_page, \"ax\", @progbits\n\t"
    ".balign 4096\n"
    "virtav_signed_page:\n\t"
    "movl $1, virtav_executed(%rip)\n\t"
    ASM_RET
    ".ascii \"" VIRTAV_SIGNATURE "\"\n\t"
    ".balign 4096\n\t"
    ".popsection");

static int __init virtav_selftest_init(void)
{
	virtav_signed_page();
	return 0;
}
module_init(virtav_selftest_init);

static void __exit virtav_selftest_exit(void)
{
}
module_exit(virtav_selftest_exit);

MODULE_DESCRIPTION("VirtAV self-test: a harmless signature in ring 0");
MODULE_LICENSE("GPL");
