"""What a hostile file says, for messages: on one line, short, and for a cost that does not depend on the value."""

from __future__ import annotations

from collections.abc import Iterator

_MOST = 120  # characters
_BITS = 400  # of whole numbers that are written out; Python itself refuses those of more than 4300 digits


def show(value: object) -> str:
    """`repr` on one line and at most 120 characters.

    The text is made piece by piece and no further than that: a tuple that holds the same tuple twice, and so on
    forty levels deep, is a few bytes in a file and has more elements than memory has bytes.
    """
    text = ""
    for piece in _pieces(value):
        text += piece
        if len(text) > _MOST:
            return text[: _MOST - 3] + "..."
    return text


def _pieces(value: object) -> Iterator[str]:
    """The parts of `repr(value)`, none empty; every level of nesting gives one before it goes deeper."""
    if isinstance(value, dict):
        for number, (key, item) in enumerate(value.items()):
            yield ", " if number else "{"
            yield from _pieces(key)
            yield ": "
            yield from _pieces(item)
        yield "}" if value else "{}"
    elif isinstance(value, (list, tuple)):
        left, right = "[]" if isinstance(value, list) else "()"
        yield left
        for number, item in enumerate(value):
            if number:
                yield ", "
            yield from _pieces(item)
        yield f",{right}" if isinstance(value, tuple) and len(value) == 1 else right
    elif isinstance(value, int) and value.bit_length() > _BITS:
        yield f"a whole number of {value.bit_length()} bits"
    elif isinstance(value, (str, bytes)):
        yield repr(value[: _MOST + 1])
    else:
        yield repr(value)
