"""Mutations of bytes, and of JSON as trees that can hold what JSON forbids: keys given twice, any literal."""

from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import dataclass
from random import Random
from typing import Union

NUMBERS = (
    *(0, 1, 2, 3, 4, 7, 8, 16, 255, 2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**61, 2**62, 2**63 - 1, 2**63, 2**64 - 1),
    *(2**64, 10**30, -1, -8, -(2**63)),
)
LITERALS = ("true", "false", "null", "-0", "0.0", "8.0", "1e1", "1e400", "1E-5", "9" * 400, "{}", "[]", '""', "[[]]")
NOT_JSON = ("NaN", "-Infinity", "08", "9" * 5000, "+1", ".5", "0x10", "'a'", "", "[", "}", "\ufeff", '"\t"', '"\\x"')
STRINGS = (
    *("", "w", "__metadata__", "dtype", "shape", "data_offsets", "a" * 3000, "..", "/", "a/b", "'", "\\", "\0"),
    *("\n", "\r\n", "\x1b[2J", "é", "\u2028", "\u202e", "ﬀ", "😀", "\\ud800", "\\udc00\\ud800", "\\u0077"),
)


@dataclass
class Literal:
    """Text that goes into the JSON as it is."""

    text: str


@dataclass
class Table:
    """A JSON object as a list of [key, value], in order and repeated as they like."""

    pairs: list[Node]


Node = Union[Literal, Table, list["Node"], str, int]  # noqa: UP007 (the names in quotes are not there yet)


def tree(value: object) -> Node:
    """Plain data as a tree."""
    if isinstance(value, dict):
        return Table([[str(key), tree(item)] for key, item in value.items()])
    if isinstance(value, (list, tuple)):
        return [tree(item) for item in value]
    if isinstance(value, (str, int)) and not isinstance(value, bool):
        return value
    return Literal(json.dumps(value))


def text(node: Node, random: Random | None = None) -> str:
    """The tree as JSON, without spaces, or with some here and there."""
    gap = "" if random is None else random.choice(("", "", "", " ", "\n", "\t "))
    if isinstance(node, Literal):
        return node.text
    if isinstance(node, Table):
        pairs = (pair if isinstance(pair, list) and len(pair) > 1 else ["x", pair] for pair in node.pairs)
        return "{" + ",".join(f"{_key(key, random)}{gap}:{text(item, random)}" for key, item, *_ in pairs) + gap + "}"
    if isinstance(node, list):
        return "[" + f",{gap}".join(text(item, random) for item in node) + "]"
    if isinstance(node, str):  # a string that starts with \u stays an escape
        return '"' + node + '"' if node.startswith("\\u") else json.dumps(node, ensure_ascii=False)
    return str(node)


def _key(node: Node, random: Random | None) -> str:
    """As the key of an object: what is no string becomes one."""
    return text(node if isinstance(node, (str, Literal)) else text(node), random)


def change(root: Node, random: Random) -> Node:
    """One random change somewhere in a tree, which is modified in place where it can be."""
    slots = list(_slots(root))
    if not slots:
        return value(random)
    home, index = random.choice(slots)
    kind = random.randrange(10)
    if kind == 0:
        del home[index]
    elif kind == 1:
        home.insert(random.randint(0, len(home)), deepcopy(home[index]))
    elif kind == 2:
        other, where = random.choice(slots)
        home[index], other[where] = other[where], home[index]
    elif kind == 3:
        home[index] = _wrapped(home[index], random)
    elif kind == 4 and isinstance(home[index], int):
        home[index] += random.choice((-8, -4, -1, 1, 4, 8, 2**32, 2**63))  # type: ignore[operator]
    elif kind == 5:
        random.shuffle(home)
    else:
        home[index] = value(random)
    return root


def value(random: Random) -> Node:
    """Something that a reader might not expect."""
    kind = random.randrange(5)
    if kind == 0:
        return random.choice(STRINGS)
    if kind == 1:
        return Literal(random.choice(LITERALS if random.random() < 0.9 else NOT_JSON))
    if kind == 2:
        return [random.choice(NUMBERS) for _ in range(random.randrange(4))]
    if kind == 3 and random.random() < 0.02:
        return Literal("[" * (depth := random.choice((50, 200, 5000))) + "]" * depth)
    return random.choice(NUMBERS)


def _wrapped(node: Node, random: Random) -> Node:
    return random.choice([[node], Table([["x", node]]), [node, deepcopy(node)], []])


def _slots(node: Node) -> list[tuple[list[Node], int]]:
    """Every place of a tree where something stands, as (list, index): pairs, keys, values, items."""
    if isinstance(node, Table):
        found: list[tuple[list[Node], int]] = []
        for index, pair in enumerate(node.pairs):
            found += _slots(pair)
            found.append((node.pairs, index))  # type: ignore[arg-type]
        return found
    if isinstance(node, list):
        return [place for index, item in enumerate(node) for place in ((node, index), *_slots(item))]
    return []


def scramble(content: bytes, random: Random, pieces: tuple[bytes, ...], end: int | None = None) -> bytes:
    """A few bytes of the first `end` replaced, removed, repeated, or a piece put between them."""
    found = bytearray(content)
    limit = len(found) if end is None else min(end, len(found))
    for _ in range(random.choice((1, 1, 1, 2, 3, 8))):
        at, length = random.randint(0, max(limit - 1, 0)), random.choice((0, 1, 1, 1, 2, 4, 8, 20))
        kind = random.randrange(5)
        if kind == 0:
            found[at : at + length] = random.randbytes(random.randrange(4))
        elif kind == 1:
            found[at : at + length] = random.choice(pieces)
        elif kind == 2 and at < len(found):
            found[at] ^= 1 << random.randrange(8)
        elif kind == 3:
            found[at:at] = found[at : at + length]
        else:
            other = random.randint(0, max(limit - 1, 0))
            found[at : at + length] = found[other : other + length]
    return bytes(found)
