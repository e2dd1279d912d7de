"""Mutations of files and payloads, by a seed."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable

HEADS: list[object] = [[], {}, "x", 3, None]
SHAPES: list[object] = [
    *([], [0], [-1], [2**63], [2**62, 4], [10**12], [0, 2**62], [0, 2**63], [1.5], ["a"], None, [4, 3, 1]),
    *([1] * 1000, [2**32, 2**32, 0], True),
]
DTYPES: list[object] = ["F8_E4M3", "F4", "I64", "BOOL", "X", "C64", "U64", "F64", "F8_E8M0", "BF16", "", None, 3]
OFFSETS: list[object] = [[0, 0], [0, 2**63], [5, 1], [-1, 4], [0], [0, 10**12], None, "0,4", [0.5, 4]]
NAMES = ["../../escaped", "/etc/escaped", "", "a" * 5000, "__metadata__", "nul\0", "\u202e"]
METADATA: list[object] = [
    None,
    [],
    {"a": 1},
    {"fedmerge": "x" * 1000},
    {"fedmerge": "[" * 5000},
    "s",
    {"fedmerge": "{}"},
]
ABOUT: list[object] = [-1, 0, 1.5, 10**400, "1", None, [], [-1], [1.5], {"loss": "x"}, {"loss": 10**400}, True, 2**64]
LENGTHS = [0, 1, 2**31, 2**63, 2**64 - 1, 10**8, 10**12]

Mutation = Callable[[bytes, random.Random], bytes]


def flipped(content: bytes, stream: random.Random) -> bytes:
    found = bytearray(content)
    for _ in range(stream.randrange(1, 6)):
        found[stream.randrange(len(found))] = stream.randrange(256)
    return bytes(found)


def cut(content: bytes, stream: random.Random) -> bytes:
    return content[: stream.randrange(len(content))]


def stuffed(content: bytes, stream: random.Random) -> bytes:
    place = stream.randrange(len(content))
    return content[:place] + stream.randbytes(stream.randrange(1, 40)) + content[place:]


def repeated(content: bytes, stream: random.Random) -> bytes:
    first, last = sorted(stream.randrange(len(content)) for _ in range(2))
    return content[:last] + content[first:]


def wrong_length(content: bytes, stream: random.Random) -> bytes:
    return struct.pack("<Q", stream.choice(LENGTHS)) + content[8:]


def wrong_header(content: bytes, stream: random.Random) -> bytes:
    """Change what a safetensors header says: shapes, types, places, names, metadata."""
    size = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + size])
    name = stream.choice([name for name in header if name != "__metadata__"])
    change = stream.randrange(7)
    if change < 3:
        key, values = [("shape", SHAPES), ("dtype", DTYPES), ("data_offsets", OFFSETS)][change]
        header[name][key] = stream.choice(values)
    elif change == 3:
        header[stream.choice(NAMES)] = header.pop(name)
    elif change == 4:
        header["__metadata__"] = stream.choice(METADATA)
    elif change == 5:
        about = json.loads(header["__metadata__"]["fedmerge"])
        about[stream.choice(list(about))] = stream.choice(ABOUT)
        header["__metadata__"]["fedmerge"] = json.dumps(about)
    else:
        header = stream.choice(HEADS)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + content[8 + size :]


ANY: tuple[Mutation, ...] = (flipped, cut, stuffed, repeated)
CHECKPOINT: tuple[Mutation, ...] = (*ANY, wrong_length, wrong_header, wrong_header, wrong_header)


def mutated(content: bytes, seed: int, mutations: tuple[Mutation, ...] = ANY) -> bytes:
    stream = random.Random(seed)
    return stream.choice(mutations)(content, stream)
