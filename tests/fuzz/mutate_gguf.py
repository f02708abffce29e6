"""Damaged copies of GGUF files by structure: metadata and the table of tensors."""

from __future__ import annotations

import random
import struct
from typing import Any

_FORMATS = ("B", "b", "H", "h", "I", "i", "f", "?", "", "", "Q", "q", "d")  # by number of the type
_STRING, _ARRAY = 8, 9
_NUMBERS = (0, 1, -1, 2, 3, 7, 32, 64, 96, 127, 128, 129, 255, 4096, 65535, 2**31, 2**32 - 1)
_NUMBERS += (2**40, 2**62, 2**63, 2**64 - 1)  # what does not fit is cut to the type's width
_FLOATS = (0.0, -1.0, 1e-30, 1e38, float("inf"), float("nan"))
_TEXTS = (b"", b"x", b"\xff\xfe", b"a\0b", b"a\nb", "\u2581".encode(), b"x" * 10_000, b"llama")
_TEXTS += (b"gpt2", b"bert", b"qwen2", b"gemma3", b"yarn", b"{{", b"{{ 9 ** 9 ** 9 }}")
_KEYS = (b"general.alignment", b"general.type", b"split.count", b"llama.rope.scaling.type")
_KEYS += (b"llama.expert_count", b"tokenizer.chat_template.x", b"tokenizer.ggml.eom_token_id")
Value = tuple[int, Any]  # number of its type, and the value; of an array, a list of those


class _Reader:
    def __init__(self, data: bytes) -> None:
        self.data, self.cursor = data, 4

    def number(self, form: str) -> Any:
        (value,) = struct.unpack_from("<" + form, self.data, self.cursor)
        self.cursor += struct.calcsize("<" + form)
        return value

    def string(self) -> bytes:
        start = self.cursor + 8
        self.cursor = start + self.number("Q")
        return self.data[start : self.cursor]

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            inner, count = self.number("I"), self.number("Q")
            return [(inner, self.value(inner)) for _ in range(count)]
        return self.number(_FORMATS[kind])


def _string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def _value(kind: int, value: Any) -> bytes:
    if kind == _STRING:
        return _string(value)
    if kind == _ARRAY:
        inner = value[0][0] if value else _STRING
        return struct.pack("<IQ", inner, len(value)) + b"".join(_value(*item) for item in value)
    form = _FORMATS[kind]
    if form not in "fd?":
        value %= 1 << 8 * struct.calcsize(form)
        form = form.upper()
    return struct.pack("<" + form, value)


def _other(kind: int, value: Any, chance: random.Random) -> Value:
    """Another value, most often of the same type."""
    if chance.random() < 0.15:
        kind = chance.choice((4, 5, 6, 7, _STRING, 10))
        value = {6: 1.0, 7: True, _STRING: b""}.get(kind, 0)
    return kind, _changed(kind, value, chance)


def _changed(kind: int, value: Any, chance: random.Random) -> Any:
    """Another value of this type."""
    if kind == _STRING:
        position = chance.randrange(len(value) + 1)
        return chance.choice(
            (*_TEXTS, value[:position], value[:position] + b"?" + value[position:])
        )
    if kind == _ARRAY:
        return _changed_array(list(value), chance)
    if _FORMATS[kind] in "fd":
        return chance.choice((*_FLOATS, 2 * value, -value))
    if _FORMATS[kind] == "?":
        return not value
    return chance.choice((*_NUMBERS, value + 1, value - 1, value * 2, value // 2))


def _changed_array(value: list[Value], chance: random.Random) -> list[Value]:
    if not value or chance.random() < 0.2:
        return chance.choice(([], [(4, 1)] * 3, [(_STRING, b"x")] * 200, value * 2))
    index = chance.randrange(len(value))
    action = chance.randrange(4)
    if action == 0:
        kind, old = value[index]
        value[index] = (kind, _changed(kind, old, chance))
    elif action == 1:
        del value[index]
    elif action == 2:
        value.insert(index, chance.choice(value))
    else:
        del value[index:]
    return value


def gguf_file(data: bytes, chance: random.Random) -> bytes:
    """A copy with one or two changes of its metadata or of its table of tensors."""
    reader = _Reader(data)
    version, tensors, pairs = reader.number("I"), reader.number("Q"), reader.number("Q")
    facts = []
    for _ in range(pairs):
        name, kind = reader.string(), reader.number("I")
        facts.append((name, (kind, reader.value(kind))))
    table = []
    for _ in range(tensors):
        name, dimensions = reader.string(), reader.number("I")
        shape = [reader.number("Q") for _ in range(dimensions)]
        table.append((name, shape, reader.number("I"), reader.number("Q")))
    rest = data[reader.cursor + -reader.cursor % 32 :]
    counts = [0, 0]
    for _ in range(chance.choice((1, 1, 2))):
        if chance.random() < 0.7:
            _change_fact(facts, chance)
        else:
            _change_tensor(table, chance)
    if chance.random() < 0.05:
        counts[chance.randrange(2)] = chance.choice((-1, 1, 1 << 40))
    if chance.random() < 0.05:
        rest = chance.choice((b"", rest[:-1], rest[: len(rest) // 2], rest + b"\0"))
    numbers = (len(table) + counts[0], len(facts) + counts[1])
    made = data[:4] + struct.pack("<IQQ", version, *(number % 2**64 for number in numbers))
    for name, (kind, value) in facts:
        made += _string(name) + struct.pack("<I", kind) + _value(kind, value)
    for name, shape, kind, offset in table:
        made += _string(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
        made += struct.pack("<IQ", kind, offset)
    return made + b"\0" * (-len(made) % 32) + rest


def _change_fact(facts: list[tuple[bytes, Value]], chance: random.Random) -> None:
    if not facts:
        return
    index = chance.randrange(len(facts))
    name, value = facts[index]
    action = chance.randrange(8)
    if action == 0:
        del facts[index]
    elif action == 1:
        facts.append((name, _other(*value, chance)))
    elif action == 2:
        facts[index] = (chance.choice((name + b"x", b"", chance.choice(facts)[0])), value)
    elif action == 3:
        facts.append((chance.choice(_KEYS), _other(4, 1, chance)))
    else:
        facts[index] = (name, _other(*value, chance))


def _change_tensor(table: list[tuple[bytes, list[int], int, int]], chance: random.Random) -> None:
    if not table:
        return
    index = chance.randrange(len(table))
    name, shape, kind, offset = table[index]
    other = chance.choice(table)
    action = chance.randrange(7)
    if action == 0:
        del table[index]
    elif action == 1:
        table.append((chance.choice((name, name + b"x", b"blk.99.ffn_up.weight")), *other[1:]))
    elif action == 2:
        table[index] = (other[0], shape, kind, offset)
    elif action == 3:
        shapes = ([], shape[::-1], [*shape, 1], other[1], [1] * 5, [2**32] * 2, [0], [2**63])
        table[index] = (name, chance.choice(shapes), kind, offset)
    elif action == 4:
        number = chance.choice((*range(40), 2**31))
        table[index] = (name, shape, number, offset)
    elif action == 5:
        odd = chance.choice((0, 1, 31, 32, offset + 32, 2**40, 2**63, other[3]))
        table[index] = (name, shape, kind, odd)
    else:
        table[index] = (name, [abs(n + chance.choice((-1, 0, 1))) for n in shape], kind, offset)
