"""Moving bytes from socket to socket within the kernel: splice(2), and the pipes that it needs."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
from collections.abc import Callable
from typing import TypeAlias

#: What a pipe is asked to hold, and what is moved at a time.
CHUNK = 1 << 20
#: Pipes at a time, idle ones included. Without CAP_SYS_RESOURCE the kernel gives a user 64 of this size in all.
MOST = 32
#: A pipe that holds less is not worth its two calls.
_LEAST = 1 << 17
_F_SETPIPE_SZ = 1031
_MOVE_NONBLOCK = 1 | 2  # SPLICE_F_MOVE | SPLICE_F_NONBLOCK

#: ``splice(source, destination, most)``: how many bytes went; raises OSError.
Splice: TypeAlias = Callable[[int, int, int], int]


def findSplice() -> Splice | None:
    """A way to call splice(2): of Python's own os module, which may be built without it, else of the C library."""
    own = getattr(os, "splice", None)
    if own is not None:

        def byOs(source: int, destination: int, most: int) -> int:
            return int(own(source, destination, most, flags=_MOVE_NONBLOCK))

        return byOs
    try:
        function = ctypes.CDLL(None, use_errno=True).splice
    except (OSError, AttributeError):
        return None
    function.restype = ctypes.c_ssize_t
    function.argtypes = (
        ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint,
    )  # fmt: skip

    def byLibrary(source: int, destination: int, most: int) -> int:
        moved = function(source, None, destination, None, most, _MOVE_NONBLOCK)
        if moved < 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        return int(moved)

    return byLibrary


class Pipe:
    """
    A pipe on loan.

    :ivar held: bytes in it.
    """

    __slots__ = ("held", "readEnd", "writeEnd")

    def __init__(self, readEnd: int, writeEnd: int) -> None:
        self.readEnd = readEnd
        self.writeEnd = writeEnd
        self.held = 0

    def close(self) -> None:
        """With whatever is in it."""
        os.close(self.readEnd)
        os.close(self.writeEnd)


class Pipes:
    """
    A bounded number of pipes, made when they are first needed, kept for the next.

    :ivar made: how many there are, idle ones included.
    """

    def __init__(self, most: int = MOST) -> None:
        self._most = most
        self._idle: list[Pipe] = []
        self.made = 0

    @property
    def idle(self) -> int:
        """How many wait for somebody."""
        return len(self._idle)

    def take(self) -> Pipe | None:
        """An empty pipe; ``None`` where there is none to be had: then bytes have to be copied."""
        if self._idle:
            return self._idle.pop()
        if self.made >= self._most:
            return None
        try:
            pipe = Pipe(*os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC))
        except OSError:
            return None
        try:
            size = fcntl.fcntl(pipe.writeEnd, _F_SETPIPE_SZ, CHUNK)
        except OSError as error:
            # The user's share of pipe memory is used up (EPERM), or this kernel caps pipes at less (EPERM, too).
            size = 0 if error.errno != errno.EBUSY else CHUNK
        if size < _LEAST:
            pipe.close()
            self._most = min(self._most, self.made)
            return None
        self.made += 1
        return pipe

    def give(self, pipe: Pipe) -> None:
        """Give one back. One that is not empty is closed: what is in it would go to somebody else."""
        if pipe.held:
            pipe.close()
            self.made -= 1
        else:
            self._idle.append(pipe)

    def close(self) -> None:
        """Close those that are idle."""
        while self._idle:
            self._idle.pop().close()
            self.made -= 1
