"""Pieces of strided views, without copying: how `count` elements of any tensor are reached in logical order."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor


def flat_range(numel: int, start: int, count: int | None) -> int:
    """The length of the range [start, start + count) of `numel` elements; ValueError if it reaches outside."""
    length = numel - start if count is None else count
    if start < 0 or length < 0 or start + length > numel:
        raise ValueError(f"elements [{start}, {start + length}) are outside a tensor of {numel} elements")
    return length


def flat_pieces(view: Tensor, start: int, count: int) -> Iterator[Tensor]:
    """Sub-views whose elements one after another are `view.flatten()[start:start + count]`.

    One of a contiguous view, else at most 2 * view.dim() + 1: full rows as one block, broken rows at either end piece
    by piece.
    """
    if count == 0:
        return
    if count == view.numel():
        yield view
        return
    if view.is_contiguous():
        yield view.view(-1)[start : start + count]
        return
    end, row = start + count, view.numel() // view.shape[0]
    first, last = -(-start // row), end // row  # rows [first, last) lie wholly inside
    if first > last:  # inside one row
        yield from flat_pieces(view[last], start - last * row, count)
        return
    if start < first * row:
        yield from flat_pieces(view[first - 1], start - (first - 1) * row, first * row - start)
    if first < last:
        yield view[first:last]
    if end > last * row:
        yield from flat_pieces(view[last], 0, end - last * row)


def span(view: Tensor) -> int:
    """Elements of storage from the first to the last element of a non-empty view."""
    return 1 + sum((size - 1) * stride for size, stride in zip(view.shape, view.stride(), strict=True))
