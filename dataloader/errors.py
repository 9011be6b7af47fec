"""The error that loaders raise, with a message meant for the user."""

import contextlib


class DataError(Exception):
    """Images cannot be had, or must not be used as they are. The message is meant for the user."""


@contextlib.contextmanager
def refusing(path):
    """Turn any exception from reading a file into a DataError that names the file.

    Damaged bytes can raise anything.
    """
    try:
        yield
    except Exception as error:
        reason = one_line(error)
        raise DataError(f"{path} cannot be used ({reason}): delete or replace it") from error


def one_line(error):
    """The error's text, short and on one line."""
    return " ".join(str(error).split())[:300] or type(error).__name__
