# SPDX-License-Identifier: Apache-2.0
"""A peer that speaks as much of clamd's protocol as a test wants."""

import contextlib
import socket
import struct
import threading


class Clamd:
    """Answers on a UNIX socket, from a thread.

    :param path: of the socket.
    :param signature: data that holds it is reported.
    :ivar version: what it says of itself.
    :ivar answer: called with number and data of a stream, gives the answer
        or None to close the connection.
    :ivar connections: how many there were.
    """

    def __init__(self, path, signature):
        self.version = 'ClamAV 1.4.6/1'
        self.signature = signature
        self.answer = self.judge
        self.connections = 0
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self.open = []
        threading.Thread(target=self._accept, daemon=True).start()

    def judge(self, number, data):
        """:returns: the answer of a clamd that knows one signature."""
        return b'%d: stream: %s\0' % (
            number, b'Test.Signature FOUND' if self.signature in data
            else b'OK')

    def hang_up(self):
        """Close all connections, as when they were idle for long."""
        for connection in self.open:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def close(self):
        """Stop answering."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.hang_up()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                connection, _address = self._listener.accept()
                self.connections += 1
                self.open.append(connection)
                threading.Thread(target=self._serve, args=(connection,),
                                 daemon=True).start()

    def _serve(self, connection):
        with contextlib.suppress(OSError), connection, connection.makefile(
                'rb') as file:
            number = 0
            while command := self._word(file):
                if command == b'zIDSESSION':
                    continue
                number += 1
                if command == b'zVERSION':
                    answer = b'%d: %s\0' % (number, self.version.encode())
                else:
                    answer = self.answer(number, self._stream(file))
                if answer is None:
                    connection.shutdown(socket.SHUT_RDWR)
                    return
                connection.sendall(answer)

    def _word(self, file):
        word = b''
        while byte := file.read(1):
            if byte == b'\0':
                return word
            word += byte
        return None

    def _stream(self, file):
        data = b''
        while size := struct.unpack('>I', file.read(4))[0]:
            data += file.read(size)
        return data
