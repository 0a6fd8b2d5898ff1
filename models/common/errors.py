"""The errors whose message is one line for the user."""


def one_line(error: Exception) -> str:
    """Return an exception's type and message as one line of at most 200 characters."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


class KerasFileError(ValueError):
    """The file cannot be converted. The message is one line: what is wrong, where, what was expected."""

    def __init__(self, message: str) -> None:
        # names in the file may be of any length, and hold control codes for the terminal
        super().__init__("".join(c if c.isprintable() else "?" for c in message[:1000]))


class OutputExistsError(Exception):
    """A file is in the way that is not ours to replace. The message is one line."""


class VerificationError(Exception):
    """The network does not compute what Keras computes. The message names the first layer that differs."""
