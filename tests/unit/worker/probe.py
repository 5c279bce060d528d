# SPDX-License-Identifier: Apache-2.0
"""Tries what a process in the sandbox must not do. A program of its own."""

import ctypes
import errno
import mmap
import os
import signal
import socket
import sys
import threading
import time

import hyperscan
import yara

from virtav_nova.worker import sandbox

_libc = ctypes.CDLL(None, use_errno=True)


def _call(name, *arguments):
    """Call the C library, which does what the kernel says."""
    if getattr(_libc, name)(*arguments) < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _fork():
    pid = os.fork()
    if not pid:
        os._exit(0)
    os.waitpid(pid, 0)


def _thread():
    thread = threading.Thread(target=int)
    thread.start()
    thread.join()


def _work():
    """What a scan process does all day."""
    rules = yara.compile(source='rule R { strings: $a = "needle" '
                                'condition: $a }')
    database = hyperscan.Database()
    database.compile(expressions=[b'needle'], ids=[1])
    with mmap.mmap(-1, 4 << 20) as page:
        page[:6] = b'needle'
        assert rules.match(data=page[:4096])
        database.scan(page[:4096], match_event_handler=lambda *_: None)
    os.fstat(0)
    time.sleep(0.001)
    bytearray(64 << 20)
    try:
        raise ValueError
    except ValueError:
        pass


def _unix():
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(sys.argv[3])
        assert connection.recv(5) == b'hello'


def _prlimit():
    limits = (ctypes.c_uint64 * 2)(0, 0)
    _call('prlimit64', os.getppid(), 7, limits, None)


TRIES = {
    'socket': lambda: socket.socket(socket.AF_INET),
    'netlink': lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW),
    'unix': _unix,
    'write': lambda: os.open(
        sys.argv[3], os.O_WRONLY | os.O_TRUNC),
    'append': lambda: os.open(
        sys.argv[3], os.O_WRONLY | os.O_APPEND),
    'read': lambda: os.open('/etc/passwd', os.O_RDONLY),
    'memory': lambda: os.open('/proc/self/mem', os.O_RDONLY),
    'list': lambda: os.listdir('/'),
    'stat': lambda: os.stat('/etc/passwd'),
    'unlink': lambda: os.unlink(sys.argv[3]),
    'exec': lambda: os.execv('/bin/true', ['true']),
    'fork': _fork,
    'thread': _thread,
    'ptrace': lambda: _call('ptrace', 16, os.getppid(), 0, 0),
    'kill': lambda: os.kill(os.getppid(), signal.SIGTERM),
    'pidfd': lambda: signal.pidfd_send_signal(0, signal.SIGTERM),
    'peek': lambda: _call('process_vm_readv', os.getppid(), 0, 0, 0, 0, 0),
    'prlimit': _prlimit,
    'mount': lambda: _call('mount', b'none', b'/mnt', b'tmpfs', 0, 0),
    'unshare': lambda: _call('unshare', 0x10000000),
    'setuid': lambda: os.setuid(0),
    'program': lambda: mmap.mmap(
        -1, 4096, prot=mmap.PROT_READ | mmap.PROT_EXEC),
    'bpf': lambda: _call('syscall', 321, 0, 0, 0),
    'io_uring': lambda: _call('syscall', 425, 8, 0),
    'keyctl': lambda: _call('syscall', 250, 0, 0),
    'old': lambda: _call('syscall', 0x40000000 | 39),
    'work': _work,
    'fork work': lambda: os.fork() or _child(),
}


def _child():
    # As the loader makes scan processes.
    print(sandbox.enter_scanner(False).seccomp, flush=True)
    _work()


def main():
    how, what = sys.argv[1:3]
    print(_enter(how), flush=True)
    try:
        TRIES[what]()
    except OSError as error:
        print('error', errno.errorcode[error.errno], flush=True)
    except RuntimeError as error:
        print('error', error, flush=True)
    else:
        print('done', flush=True)
    if how.startswith('wait'):
        sys.stdin.read()


def _enter(how):
    local = how.endswith('local')
    if how == 'none':
        return None
    state = sandbox.enter_loader(local)
    if not how.startswith('loader'):
        state = sandbox.enter_scanner(local)
    return state.seccomp


if __name__ == '__main__':
    main()
