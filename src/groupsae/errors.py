"""What a user is meant to see: what cannot work, and that training was stopped."""

from signal import Signals


class InputError(ValueError):
    """Something the user gave cannot work.

    The message names the thing (key, file, model), its value and the mend, on its own: the command
    line prints it as it is, without a traceback, and exits with `exit_code`.
    """

    exit_code = 2


class Interrupted(Exception):  # noqa: N818 - nothing is wrong
    """Training was told to stop by a signal, and has: a checkpoint holds every step that it took.

    Attributes:
        exit_code: 128 + the signal's number, as shells have it.
    """

    def __init__(self, signal: Signals, step: int) -> None:
        super().__init__(
            f"stopped by {signal.name} after step {step}; a checkpoint holds it, the same command "
            "continues"
        )
        self.exit_code = 128 + signal
