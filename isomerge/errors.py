"""The one error that is the user's to mend."""


class InputError(ValueError):
    """What the user gave cannot be used; the message is one line that says what, where, and what to do instead.

    Raised before anything is written. The command line prints the message alone and exits with code 2;
    every other exception is a failure while running (exit code 1).
    """
