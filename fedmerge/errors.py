"""The base of the errors that tell a user what to do: the command prints them without a traceback."""

from __future__ import annotations


class FedmergeError(Exception):
    """What was expected, what came, and what to do."""
