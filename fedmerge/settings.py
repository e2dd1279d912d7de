"""Settings and names as a user types them: checked, converted, and refused with what was expected."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable
from decimal import Decimal

from fedmerge.errors import FedmergeError

Value = bool | int | float | str


class ConfigurationError(FedmergeError, ValueError):
    """A setting that cannot be used, with what was expected and what to do."""


def known(what: str, name: str, names: Iterable[str]) -> None:
    """Raise unless `name` is one of `names`, suggesting the nearest.

    Args:
        what: what is named, for the message ("data set", "--init").
        name: the name that came.
        names: the names that exist.

    Raises:
        ConfigurationError: names what exists.

    Example:
        >>> known("data set", "fashon-mnist", ["digits", "fashion-mnist"])
        Traceback (most recent call last):
        fedmerge.settings.ConfigurationError: unknown data set 'fashon-mnist'; did you mean 'fashion-mnist'? \
Known: digits, fashion-mnist
    """
    names = list(names)
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean '{near[0]}'? " if near else ""
        raise ConfigurationError(f"unknown {what} '{name}'; {hint}Known: {', '.join(names)}")


def key(name: str) -> str:
    """Return a field's key in TOML: dashes for underscores."""
    return name.replace("_", "-")


def flag(name: str) -> str:
    """Return a field's flag on the command line."""
    return "--" + key(name)


def convert(what: str, value: object, kind: type) -> Value:
    """Return a setting in its declared type; text may stand for numbers and truth values.

    Args:
        what: the setting, for the message.
        value: what came.
        kind: bool, int, float or str.

    Raises:
        ConfigurationError: if it cannot be converted without loss.
    """
    expected = {bool: "true or false", int: "a whole number", float: "a finite number", str: "a string"}[kind]
    error = ConfigurationError(f"{what} must be {expected}, got {value!r}")
    if kind is bool:
        if isinstance(value, bool):
            return value
        if isinstance(value, str) and value.lower() in ("true", "false"):
            return value.lower() == "true"
        raise error
    if kind is str and isinstance(value, (str, int)) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, (int, float, str)) and not isinstance(value, bool) and kind is not str:
        try:
            number = float(value)
        except (ValueError, OverflowError):
            raise error from None
        if math.isfinite(number):
            if kind is float:
                return number
            exact = Decimal(value)  # a float has no room for the digits of a large seed
            if exact == int(exact):
                return int(exact)
    raise error


def counted(what: str, text: str) -> list[tuple[str, int]]:
    """Return the names and counts of NAME:COUNT,NAME:COUNT,…; a name may have colons itself.

    Args:
        what: the setting, for the message.
        text: what came; spaces around a part do not matter.

    Raises:
        ConfigurationError: names the part that has no count from 1.

    Example:
        >>> counted("--models", "cnn:2, package.module:function:1")
        [('cnn', 2), ('package.module:function', 1)]
    """
    found = []
    for part in text.split(","):
        name, _, count = part.strip().rpartition(":")
        if not name or not re.fullmatch("0*[1-9][0-9]{0,8}", count, re.ASCII):
            raise ConfigurationError(f"{what} must be NAME:COUNT,NAME:COUNT,… with counts from 1, got {part.strip()!r}")
        found.append((name, int(count)))
    return found
