/* SPDX-License-Identifier: Apache-2.0 */
/* The encrypted pages that selftest.c writes into memory. */
	.section .rodata
	.globl	signed_page, clean_page
signed_page:
	.incbin	"page.enc"
clean_page:
	.incbin	"clean.enc"

	.section .note.GNU-stack, "", @progbits
