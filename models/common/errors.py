"""The errors whose message is one line for the user."""

import unicodedata


def printable(text: str) -> str:
    """Return text as one line of what a terminal prints: text from a file may hold control codes for it."""
    return "".join(c if c.isprintable() or unicodedata.category(c) == "Zs" else "?" for c in text)


def one_line(error: Exception) -> str:
    """Return an exception's type and message as one line of at most 200 characters."""
    return printable(" ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":")[:200])


class KerasFileError(ValueError):
    """The file cannot be converted. The message is one line: what is wrong, where, what was expected."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message[:1000]))  # names in the file may be of any length


class OutputExistsError(Exception):
    """A file is in the way that is not ours to replace. The message is one line."""


class VerificationError(Exception):
    """The network does not compute what Keras computes. The message names the first layer that differs."""
