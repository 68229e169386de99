"""The one error that a user is meant to see."""


class InputError(ValueError):
    """Something the user gave cannot work.

    The message names the thing (key, file, model), its value and the mend, on its own: the command
    line prints it as it is, without a traceback, and exits with code 2.
    """
