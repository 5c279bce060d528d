/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The page that every user-mode case runs: one page of position-independent
 * code that leaves the mark and ends the process, and that carries the
 * signature unless PAGE_CLEAN is defined. The mark is the first byte of the
 * memory file on descriptor 3, which the runner (selftest.c) has mapped.
 *
 * Exit status: 0, or 70 if the mark could not be written.
 */
#include "signature.h"

	.text
	.balign	4096
	.globl	_start
_start:
	mov	$18, %eax		/* pwrite64(3, mark, 1, 0) */
	mov	$3, %edi
	lea	mark(%rip), %rsi
	mov	$1, %edx
	xor	%r10d, %r10d
	syscall
	xor	%edi, %edi
	cmp	$1, %rax
	je	end
	mov	$70, %edi
end:
	mov	$231, %eax		/* exit_group(edi) */
	syscall
	hlt
mark:
	.byte	1
#ifndef PAGE_CLEAN
	.ascii	VIRTAV_SIGNATURE
#endif
	.balign	4096

	.section .note.GNU-stack, "", @progbits
