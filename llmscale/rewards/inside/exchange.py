"""What travels between a program and its judge: frames of JSON, in which values are data and nothing else.

An object that is no data (a generator, an instance of the program's own class) stays where it is and travels as a number.
So the judge, who compares, never runs anything of the program's: an object that says it equals everything convinces nobody.
"""

from __future__ import annotations

import builtins
import json
import socket
import struct
from collections import deque
from collections.abc import Callable
from datetime import date, datetime
from decimal import Decimal
from fractions import Fraction
from typing import Any

MAX_FRAME_BYTES = 4 * 2**20
_SMALL = 2**63  # larger ints travel in hexadecimal: Python refuses to read thousands of decimal digits

Hook = Callable[[Any], Any]  # encode: an object that is no data -> (tag, value); decode: the inverse


class Wire:
    def __init__(self, connection: socket.socket):
        self._connection = connection

    def send(self, message: Any) -> None:
        data = json.dumps(message).encode()
        if len(data) > MAX_FRAME_BYTES:
            raise ValueError(f"a value of {len(data)} bytes cannot be handed over, at most {MAX_FRAME_BYTES}")
        self._connection.sendall(struct.pack("=I", len(data)) + data)

    def receive(self) -> Any:
        """Raises: EOFError when the other side is gone; ValueError for what it should never have sent."""
        (size,) = struct.unpack("=I", self._read(4))
        if size > MAX_FRAME_BYTES:
            raise ValueError("too long a message")
        return json.loads(self._read(size))

    def _read(self, size: int) -> bytes:
        parts = []
        while size:
            try:
                part = self._connection.recv(min(size, 65536))
            except ConnectionError:
                part = b""
            if not part:
                raise EOFError
            parts.append(part)
            size -= len(part)
        return b"".join(parts)


def encode(value: Any, other: Hook) -> Any:
    """JSON for a value: lists as they are, all else that JSON does not have as {tag: ...}. Subclasses become their base."""
    if value is None or isinstance(value, bool | float | str):
        return value
    if isinstance(value, int):
        return value + 0 if -_SMALL < value < _SMALL else {"int": hex(value)}

    def each(values: Any) -> list[Any]:
        return [encode(v, other) for v in values]

    match value:
        case list():
            return each(value)
        case tuple():
            return {"tuple": each(value)}
        case dict():
            return {"dict": [each(pair) for pair in value.items()]}
        case set():
            return {"set": each(value)}
        case frozenset():
            return {"frozenset": each(value)}
        case deque():
            return {"deque": each(value)}
        case bytes() | bytearray():
            return {type(value).__name__ if type(value) is bytearray else "bytes": value.hex()}
        case complex():
            return {"complex": [value.real, value.imag]}
        case range():
            return {"range": [value.start, value.stop, value.step]}
        case Fraction():
            return {"Fraction": str(value)}
        case Decimal():
            return {"Decimal": str(value)}
        case datetime():
            return {"datetime": value.isoformat()}
        case date():
            return {"date": value.isoformat()}
    tag, content = other(value)
    return {tag: content}


def decode(message: Any, other: Hook) -> Any:
    """Inverse of `encode`; `other` takes (tag, value) of what is no data."""
    if isinstance(message, list):
        return [decode(m, other) for m in message]
    if not isinstance(message, dict):
        return message
    ((tag, content),) = message.items()
    match tag:
        case "int":
            return int(content, 16)
        case "tuple" | "set" | "frozenset":
            return getattr(builtins, tag)(decode(content, other))
        case "deque":
            return deque(decode(content, other))
        case "dict":
            return dict(decode(content, other))
        case "bytes":
            return bytes.fromhex(content)
        case "bytearray":
            return bytearray.fromhex(content)
        case "complex":
            return complex(*content)
        case "range":
            return range(*content)
        case "Fraction":
            return Fraction(content)
        case "Decimal":
            return Decimal(content)
        case "datetime":
            return datetime.fromisoformat(content)
        case "date":
            return date.fromisoformat(content)
    return other((tag, content))
