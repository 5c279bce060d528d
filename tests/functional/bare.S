/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A firmware that does what a test tells it, for -bios. Each vCPU calls the
 * functions that it is given in the mailbox at the start of its own page,
 * 0x10000 + 4096 * APIC ID, in 64-bit mode at CPL 0:
 *
 *   0    address of the function; 0 when it has returned
 *   8    rdi, rsi, rdx, rcx for it
 *   40   what it returned in rax
 *   48   how often the vCPU has started
 *   56   what else the function has to tell, 64 and on
 *
 * The page ends with its stack. Only the first vCPU runs at the start; the
 * function "start_others" starts the others.
 *
 * All addresses below 8 GiB are mapped to themselves, and once more from
 * 8 GiB on, for all privilege levels.
 */

        .set HERE, 0x20000              /* in RAM, where it copies itself */
        .set MAILBOX, 0x10000
        .set APIC, 0xfee00000

/* Of the page of a vCPU */
        .set TSS, 0x100
        .set GDT, 0x180
        .set USER_STACK, 0xc00

/* Names of the functions, for the tests: 16 bytes and an address each. */
        .macro function name
        .pushsection .names, "a"
1:      .ascii "\name"
        .org 1b + 16
        .quad HERE + (\name - _start)
        .popsection
        .p2align 4
\name:
        .endm

        .text
        .code16
        .globl _start
_start:
        cld
        movw %cs, %ax
        movw %ax, %ds
        movw $HERE >> 4, %ax
        movw %ax, %es
        xorl %esi, %esi
        xorl %edi, %edi
        movl $0x4000, %ecx
        rep movsl
        ljmp $(HERE + 0x1000) >> 4, $0

        .org 0x1000
others:                                 /* where the others start */
        cli
        lgdtl %cs:gdtr - others
        movl $0x620, %eax               /* PAE, SSE */
        movl %eax, %cr4
        movl $HERE + 0xd000, %eax
        movl %eax, %cr3
        movl $0xc0000080, %ecx
        rdmsr
        orl $0x100, %eax                /* EFER.LME */
        wrmsr
        movl $0x80000033, %eax          /* PG, NE, ET, MP, PE */
        movl %eax, %cr0
        ljmpl $8, $HERE + (in_long_mode - _start)

        .code64
in_long_mode:
        movl $16, %eax
        movl %eax, %ds
        movl %eax, %es
        movl %eax, %ss
        movl $APIC + 0x20, %eax
        movl (%rax), %ebx
        shrl $24, %ebx
        shll $12, %ebx
        addl $MAILBOX, %ebx
        leaq 0x1000(%rbx), %rsp

        /* Its own GDT, with a TSS, for the way back from CPL 3 */
        movl $HERE + (gdt - _start), %esi
        leaq GDT(%rbx), %rdi
        movl $gdtr - gdt, %ecx
        rep movsb
        leal TSS(%rbx), %eax
        movl %eax, %ecx
        shll $16, %ecx
        orl $0x67, %ecx
        movl %ecx, (%rdi)
        shrl $16, %eax
        orl $0x8900, %eax
        movl %eax, 4(%rdi)
        movq $0, 8(%rdi)
        leaq GDT(%rbx), %rax
        pushq %rax
        pushw $gdtr - gdt + 16 - 1
        lgdt (%rsp)
        addq $10, %rsp
        movl $gdtr - gdt, %eax
        ltr %ax
        pushq $HERE + 0x4000
        pushw $16 * 14 - 1
        lidt (%rsp)
        addq $10, %rsp

        movq $0, (%rbx)
        incq 48(%rbx)
1:      pause
        movq (%rbx), %rax
        testq %rax, %rax
        jz 1b
        movq 8(%rbx), %rdi
        movq 16(%rbx), %rsi
        movq 24(%rbx), %rdx
        movq 32(%rbx), %rcx
        pushq %rbx
        call *%rax
        popq %rbx
        movq %rax, 40(%rbx)
        movq $0, (%rbx)
        jmp 1b

/* Start the other vCPUs. */
        function start_others
        movl $APIC + 0x300, %eax
        movl $0xc4500, (%rax)           /* INIT, all but this one */
        movl $100000, %ecx
1:      pause
        loop 1b
        movl $0xc4600 + ((HERE + 0x1000) >> 12), (%rax)
        ret

/* Copy rdx bytes from rsi to rdi. */
        function copy
        movq %rdx, %rcx
        rep movsb
        ret

/* Count down from rdi. */
        function spin
        movq %rdi, %rax
1:      decq %rax
        jnz 1b
        ret

/*
 * Write a new instruction to each of rsi pages from rdi on and run it, until
 * the byte at rdx is not 0. Returns how often.
 */
        function storm
        xorl %eax, %eax
        movl %eax, %r8d
        movl $0xc3, %r11d
1:      movq %rdi, %r9
        movq %rsi, %r10
2:      movb $0xb8, (%r9)               /* mov $..., %eax; ret */
        movl %r8d, 1(%r9)
        movb %r11b, 5(%r9)
        call *%r9
        incq %r8
        addq $0x1000, %r9
        cmpb $0, (%rdx)
        jne 3f
        decq %r10
        jnz 2b
        jmp 1b
3:      movq %r8, %rax
        ret

/*
 * Run the code on each of rsi pages from rdi on, see "storm", at CPL 3.
 * Returns how often it ran. Behind the result: how often it got a fault
 * instead, and how often it returned a number that has bit 8 set.
 */
        function fetch
        movq %rsp, TSS + 4(%rbx)
        movq $0, 56(%rbx)
        movq $0, 64(%rbx)
        xorl %r8d, %r8d
        xorl %r13d, %r13d
        movl $HERE + (2f - _start), %r15d
        leaq USER_STACK(%rbx), %r14
        pushq $24 | 3
        pushq %r14
        pushq $2
        pushq $32 | 3
        pushq $HERE + (0f - _start)
        iretq

0:      movq %rdi, %r9
        movq %rsi, %r10
1:      call *%r9
        incq %r8
        testl $0x100, %eax
        jz 2f
        incq 64(%rbx)
2:      addq $0x1000, %r9               /* also after a fault */
        cmpb $0, (%rdx)
        jne 3f
        decq %r10
        jnz 1b
        jmp 0b
3:      incl %r13d
        hlt                             /* faults */

/* Wait for up to 2^17 turns; r15 is a random number, r14 is lost. */
hesitate:
        imulq $1664525, %r15
        addq $1013904223, %r15
        movl %r15d, %r14d
        shrl $15, %r14d
1:      decl %r14d
        jns 1b
        ret

/*
 * Change the operand of the first instruction of one of these pages, and
 * more, 256 times, then wait for a moment, and go on with another one. There
 * are a power of two; rcx is any number.
 */
        function rewrite
        pushq %r15
        pushq %r14
        movq %rcx, %r15
        movl %ecx, %r8d
        xorl %eax, %eax
        decl %esi
1:      call hesitate
        movl %r15d, %r9d
        shrl $8, %r9d
        andl %esi, %r9d
        shll $12, %r9d
        addq %rdi, %r9
        movl $256, %r10d
2:      movl %r8d, 1(%r9)
        lock addl %r8d, 0x800(%r9)
        incl %r8d
        incq %rax
        decl %r10d
        jnz 2b
        cmpb $0, (%rdx)
        je 1b
        popq %r14
        popq %r15
        ret

/*
 * Have fw_cfg do rsi transfers from rdi on, over and over, see above. What is
 * at rdi are 32 bytes each: 16 that it takes, and the first 4 again.
 */
        function transfer
        pushq %r15
        pushq %r14
        movq %rcx, %r15
        movq %rdx, %r11
        xorl %r8d, %r8d
1:      movq %rdi, %r9
        movq %rsi, %r10
2:      call hesitate
        movl 16(%r9), %eax
        movl %eax, (%r9)
        movw $0x514, %dx
        xorl %eax, %eax
        outl %eax, %dx
        movw $0x518, %dx
        movl %r9d, %eax
        bswapl %eax
        outl %eax, %dx
        incq %r8
        addq $32, %r9
        cmpb $0, (%r11)
        jne 3f
        decq %r10
        jnz 2b
        jmp 1b
3:      movq %r8, %rax
        popq %r14
        popq %r15
        ret

/* The only exception there is a handler for: #GP, and only from "fetch" */
        .org 0x3000
general_protection:
        testl %r13d, %r13d
        jnz 1f
        incq 56(%rbx)
        addq $8, %rsp
        movq %r15, (%rsp)
        movq %r14, 24(%rsp)
        iretq
1:      movq TSS + 4(%rbx), %rsp
        movq %r8, %rax
        ret

        .org 0x4000 + 16 * 13           /* in the IDT */
        .word 0x3000, 8, 0x8e00, HERE >> 16, 0, 0, 0, 0

        .p2align 3
gdt:    .quad 0
        .quad 0x00af9b000000ffff
        .quad 0x00cf93000000ffff
        .quad 0x00cff3000000ffff        /* for CPL 3 */
        .quad 0x00affb000000ffff
gdtr:   .word . - gdt - 1
        .long HERE + (gdt - _start)

        .section .tables, "a"           /* at 0xd000 */
        .quad HERE + 0xe000 + 0x67
        .org 0x1000
        .set page, 0
        .rept 16
        .quad ((page & 7) << 30) + 0xe7
        .set page, page + 1
        .endr
        .org 0x2000

        .section .reset, "a"            /* at 0xfff0 */
        .code16
        ljmp $0xf000, $0
        .org 16
