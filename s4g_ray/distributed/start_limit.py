"""Limit the start of Ray, also where it hangs in native code, which no exception reaches.

A raylet that dies while it starts leaves Ray waiting in native code without end.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

GRACE_S = 20.0  # for a start to end after its limit, or after Ctrl-C
AGAIN_S = 5.0  # after which a start that went on in spite of its limit is ended again
CTRL_C = 130  # exit code


class TooLateError(BaseException):
    """Ray takes too long. No Exception, because Ray catches those."""


@contextmanager
def limited(limit_s: float, message: str) -> Iterator[None]:
    """Raise TooLateError in the block after limit_s.

    A block that does not end within GRACE_S after its limit, or after Ctrl-C, hangs in native
    code: then the process ends, with a message and exit code 1 or 130. Does nothing outside the
    main thread, which signals reach alone.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(*_: object) -> None:
        raise TooLateError

    ended = threading.Event()
    receiver, sender = socket.socketpair()
    sender.setblocking(False)
    watcher = threading.Thread(target=_watch, args=(receiver, ended, message), daemon=True)
    watcher.start()
    descriptor = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
    before = signal.signal(signal.SIGALRM, end)
    alarm = signal.setitimer(signal.ITIMER_REAL, limit_s, AGAIN_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        if before is not None:  # it was installed from Python
            signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, *alarm)  # of the program around this one
        signal.set_wakeup_fd(descriptor)
        ended.set()
        sender.close()
        watcher.join()
        receiver.close()


def _watch(signals: socket.socket, ended: threading.Event, message: str) -> None:
    """Wait for a signal; end the process when the block does not end after it."""
    while True:
        received = signals.recv(1)  # the number of a signal; empty at the end of the block
        if not received:
            return
        number = received[0]
        if number in (signal.SIGALRM, signal.SIGINT) and not ended.wait(GRACE_S):
            is_interrupted = number == signal.SIGINT
            text = "interrupted" if is_interrupted else message
            os.write(2, f"s4g: {text}\n".encode())
            time.sleep(0.5)  # a thread may pass it on to the terminal
            os._exit(CTRL_C if is_interrupted else 1)
