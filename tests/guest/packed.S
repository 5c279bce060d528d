/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A packed executable: the page of page.S is stored encrypted in the data
 * segment, is decrypted where it lies, and is then jumped into. The cipher is
 * that of decrypt() in selftest.c.
 *
 * Exit status: that of page.S, or 71 if the page could not be made executable.
 */
	.text
	.globl	_start
_start:
	mov	$10, %eax		/* mprotect(page, 4096, R | W | X) */
	lea	page(%rip), %rdi
	mov	$4096, %esi
	mov	$7, %edx
	syscall
	test	%rax, %rax
	jnz	fail

	mov	%rdi, %rsi
	mov	$4096, %edx
	xor	%ecx, %ecx
next:
	imul	$1664525, %ecx, %ecx
	add	$1013904223, %ecx
	mov	%ecx, %eax
	shr	$24, %eax
	xor	%al, (%rsi)
	inc	%rsi
	dec	%edx
	jnz	next
	jmp	*%rdi
fail:
	mov	$231, %eax		/* exit_group(71) */
	mov	$71, %edi
	syscall
	hlt

	.data
	.balign	4096
page:
	.incbin	"page.enc"

	.section .note.GNU-stack, "", @progbits
