"""Being told to stop: by Ctrl-C, by a scheduler that takes the machine back."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from signal import Signals
from types import FrameType

# What terminals, service managers and schedulers (Slurm's --signal, LSF, HTCondor) send first.
_NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")
SIGNALS = tuple(getattr(signal, name) for name in _NAMES if hasattr(signal, name))


class Request:
    """Whether a signal has come."""

    signal: Signals | None = None


@contextmanager
def stopping_on_signals() -> Iterator[Request]:
    """Yield a request that notes the first signal; a second one interrupts at once.

    Only the main thread can listen to signals: elsewhere none is noted. One that the process was
    started to ignore (as a shell's background jobs ignore Ctrl-C, and `nohup` SIGHUP) is left so.
    """
    request = Request()

    def note(number: int, frame: FrameType | None) -> None:
        if request.signal is not None:
            raise KeyboardInterrupt
        request.signal = Signals(number)

    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    listened = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, note) for number in listened}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
