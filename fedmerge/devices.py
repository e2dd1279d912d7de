"""Devices that differ: how much a client trains, in which numbers it answers, and how much of its model it sends."""

from __future__ import annotations

from dataclasses import dataclass

from fedmerge.settings import ConfigurationError, counted, known

KINDS = ("full", "epochs=N", "float16", "layers=N")


@dataclass(frozen=True)
class Device:
    """What a client's device can do.

    Attributes:
        epochs: passes over its data that it trains; 0: as all others (`--local-epochs`).
        float16: whether it sends its numbers in float16.
        layers: how many of its last layers it trains and sends, the others being frozen at the shared start; 0: all.
    """

    epochs: int = 0
    float16: bool = False
    layers: int = 0


def parse_device(text: str) -> Device:
    """Return the device that a text describes: parts of `KINDS`, joined by plus signs.

    Args:
        text: as "epochs=1+float16".

    Raises:
        ConfigurationError: says what was expected.

    Example:
        >>> parse_device("epochs=1+float16")
        Device(epochs=1, float16=True, layers=0)
    """
    found: dict[str, int | bool] = {}
    for part in text.split("+"):
        name, equals, value = part.partition("=")
        known("kind of device in --devices", name, [kind.partition("=")[0] for kind in KINDS])
        if name in ("full", "float16"):
            if equals:
                raise ConfigurationError(f"--devices: {name} takes no value, got {part!r}")
            found |= {} if name == "full" else {name: True}
        elif value.isdecimal() and value.isascii() and int(value) >= 1:
            found[name] = int(value)
        else:
            raise ConfigurationError(f"--devices: expected {name}=N with a whole number from 1, got {part!r}")
    return Device(**found)  # type: ignore[arg-type]


def parse_devices(text: str, clients: int) -> tuple[Device, ...]:
    """Return each client's device, in their order; those that are not told of are full ones.

    Args:
        text: DEVICE:COUNT,DEVICE:COUNT,…; may be empty.
        clients: how many there are.

    Raises:
        ConfigurationError: if it tells of more than there are.
    """
    parts = counted("--devices", text) if text else []
    if sum(count for _, count in parts) > clients:
        raise ConfigurationError(
            f"--devices {text} has {sum(count for _, count in parts)} clients, but there are {clients} (--clients)"
        )
    found = [parse_device(name) for name, count in parts for _ in range(count)]
    return (*found, *[Device()] * (clients - len(found)))
