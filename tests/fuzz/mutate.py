"""Damaged copies of what people hand to the command: structure first, bytes second."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from typing import Any

ODD: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 3, 2**31, 2**63, -(2**63), 10**40, 0.5, 1e308, float("nan")),
    *("", "x", "x" * 10_000, "../../outside", "/etc/passwd", "a\0b", "a\nb", "\ud800", "１２"),
    *([], {}, [[]], [None], ["x"] * 1000, {"": ""}, [[[[[[[[]]]]]]]], float("inf")),
    *("gemma2", "qwen3", "mixtral", "deepseek_v3", "gpt_neox", "mamba", "t5", "bfloat16", "int8"),
    *("org/kernel", "own.Own", {"AutoModelForCausalLM": "own.Own"}, {"AutoTokenizer": ["own.T"]}),
)
KEYS = (
    *("auto_map", "quantization_config", "attn_implementation", "per_layer_config", "text_config"),
    *(
        "torch_dtype",
        "dtype",
        "tokenizer_class",
        "chat_template",
        "num_hidden_layers",
        "layer_types",
        "model_type",
        "rope_parameters",
    ),
)
TEMPLATES = (
    *(
        "{{ ''.__class__.__mro__ }}",
        "{% include '/etc/passwd' %}",
        "{{ 1 / 0 }}",
        "{{ messages[9] }}",
    ),
    *(
        "{{ raise_exception('no') }}",
        "{% for i in range(99999) %}x{% endfor %}",
        "{{ x.y.z }}",
        "{{",
    ),
    *(
        "{{ 'x' * 10 ** 9 }}",
        "{{ 9 ** 9 ** 9 }}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    ),
    *(
        "{{ range(10 ** 12) | list }}",
        "{% set a = namespace(b=self) %}{{ a.b }}",
        "{{ strftime_now(1) }}",
    ),
    *("{{ lipsum.__globals__ }}", "{{ cycler.__init__.__globals__.os.system('true') }}", "\ud800"),
)
YAML = (
    *("!!python/object/apply:os.system ['true']", "!!python/name:os.system", "!own x", "&a [*a]"),
    *("*a", "{<<: {groups: []}}", "{a: 1, a: 2}", "? [1, 2]\n: 3", "2001-01-01", "1_000", "0x10"),
    *("0o17", "1:30", ".inf", "~", "yes", "!!binary aGk=", "!!set {1, 2}", "---", "%TAG ! tag:x,"),
    *("[" * 3000, "{" * 3000, "&a [x, &b [*a, *a, *a], *b, *b]", "\t- 1", "|\n  x", "!!float x"),
    "!!int ''",
    "!!timestamp 2001-99-99",
)


def places(value: Any) -> list[tuple[Any, Any]]:
    """(container, key) of everything inside a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    inside = [(value, key) for key, _ in items]
    for container, key in list(inside):
        if isinstance(container[key], dict | list):
            inside += places(container[key])
    return inside


def way(value: Any, chance: random.Random) -> tuple[Any, Any]:
    """(container, key) at the end of a walk from the top: large tables get no more than others."""
    while True:
        key = chance.choice(list(value) if isinstance(value, dict) else range(len(value)))
        if not isinstance(value[key], dict | list) or not value[key] or chance.random() < 0.3:
            return value, key
        value = value[key]


def json_value(value: Any, chance: random.Random) -> Any:
    """A copy with one to three changes."""
    value = copy.deepcopy(value)
    for _ in range(chance.choice((1, 1, 2, 3))):
        inside = places(value)
        if not inside:
            return chance.choice(ODD)
        container, key = chance.choice(inside) if chance.random() < 0.5 else way(value, chance)
        kind = chance.randrange(6)
        if kind == 0:
            del container[key]
        elif kind == 1:
            other, at = chance.choice(inside)
            container[key] = copy.deepcopy(other[at])
        elif kind == 2 and isinstance(container, dict):
            container[chance.choice((*KEYS, str(key) + "x", ""))] = container.pop(key)
        elif kind == 3 and isinstance(container, dict):
            container[chance.choice(KEYS)] = copy.deepcopy(chance.choice(ODD))
        elif kind == 4 and isinstance(container[key], int | float):
            container[key] = container[key] * chance.choice((-1, 0, 2, 10**6)) + chance.choice(
                (0, 1)
            )
        else:
            container[key] = copy.deepcopy(chance.choice(ODD))
    return value


def dump(value: Any) -> bytes:
    return json.dumps(value).encode("utf-8", "surrogatepass")


def json_file(data: bytes, chance: random.Random) -> bytes:
    return dump(json_value(json.loads(data), chance))


def safetensors_file(data: bytes, chance: random.Random) -> bytes:
    size = int.from_bytes(data[:8], "little")
    header, rest = json.loads(data[8 : 8 + size]), data[8 + size :]
    if chance.random() < 0.2 and "__metadata__" in header:  # JSON within a string
        names = [n for n, text in header["__metadata__"].items() if text.startswith("{")]
        if names:
            inner = json_value(json.loads(header["__metadata__"][names[0]]), chance)
            header["__metadata__"][names[0]] = json.dumps(inner)
    else:
        header = json_value(header, chance)
    text = dump(header)
    length = chance.choice((len(text),) * 8 + (0, len(text) + 1, 2**63, len(text) - 1))
    rest = chance.choice((rest,) * 8 + (rest[:-1], rest + b"\0", b"", rest[len(rest) // 2 :]))
    return length.to_bytes(8, "little") + text + rest


def template_file(data: bytes, chance: random.Random) -> bytes:
    text = data.decode()
    position = chance.randrange(len(text) + 1)
    return (text[:position] + chance.choice(TEMPLATES) + text[position:]).encode(
        "utf-8", "surrogatepass"
    )


def yaml_file(data: bytes, chance: random.Random) -> bytes:
    """What only YAML knows, after JSON or in a place of it; or changed JSON, which is YAML, too."""
    if chance.random() < 0.5:
        return json_file(data, chance)
    odd = chance.choice(YAML)
    value = json.loads(data)
    container, key = chance.choice(places(value))
    container[key] = "PLACE"
    text = json.dumps(value).replace('"PLACE"', odd)
    return (text if chance.random() < 0.7 else f"{data.decode()}\n{odd}\n").encode()


def raw_file(data: bytes, chance: random.Random, most: int = 1 << 30) -> bytes:
    """Bytes changed, cut out, put in or repeated, among the first `most`."""
    changed = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 4, 8))):
        position = chance.randrange(max(1, min(len(changed), most)))
        kind = chance.randrange(6)
        if kind == 0:
            changed[position : position + 1] = bytes([chance.randrange(256)])
        elif kind == 1:
            width = chance.choice((1, 2, 4, 8))
            number = chance.choice((0, 1, -1, 2 ** (8 * width - 1) - 1, -(2 ** (8 * width - 1))))
            changed[position : position + width] = number.to_bytes(width, "little", signed=True)
        elif kind == 2:
            del changed[position : position + chance.choice((1, 4, 64, 4096))]
        elif kind == 3:
            changed[position:position] = chance.randbytes(chance.choice((1, 4, 64)))
        elif kind == 4:
            changed[position:position] = changed[position : position + chance.choice((4, 64, 1024))]
        else:
            del changed[position:]
    return bytes(changed)


def either(structured: Callable[[bytes, random.Random], bytes]) -> Any:
    """Four times in five by structure, else raw bytes."""

    def mutate(data: bytes, chance: random.Random) -> bytes:
        return (structured if chance.random() < 0.8 else raw_file)(data, chance)

    return mutate
