"""The errors that are the user's to mend."""


class InputError(ValueError):
    """What the user gave cannot be used; the message is one line that says what, where, and what to do instead.

    Raised before anything is written. The command line prints the message alone and exits with code 2;
    every other exception is a failure while running (exit code 1).
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class NonFiniteError(InputError):
    """NaN or Inf in an expert, found while merging. Leaving such entries out changes nothing of what is merged by then,
    so that it need not be merged again.
    """


def printable(text: str) -> str:
    """The text on one line, control characters escaped: names in hostile files may hold what terminals obey."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
