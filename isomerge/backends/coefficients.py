"""Compositions of odd quintics that map [l, 1] to 1: the schedules of Newton-Schulz iterations.

One step takes the singular values x of X to p(x) = a x + b x³ + c x⁵, that is X to (a I + b XXᵀ + c (XXᵀ)²) X. Each p
is the best on the interval [l, u] that the singular values occupy, after which they occupy [p(l), 2 - p(l)]: the
greedy choice, which is the optimal one (Polar Express, Amsel et al. 2025, arXiv 2505.16932).
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

NEWTON_SCHULZ = (15 / 8, -10 / 8, 3 / 8)
"""The limit for l → u = 1: p(1) = 1, p'(1) = p''(1) = 0."""


class Step(NamedTuple):
    """x → a x + b x³ + c x⁵ for x from `lower` on."""

    a: float
    b: float
    c: float
    lower: float

    def __call__(self, x: float) -> float:
        return x * (self.a + x * x * (self.b + x * x * self.c))


@lru_cache(maxsize=1024)
def schedule(lower: float, tolerance: float, safety: float) -> tuple[Step, ...]:
    """Steps after which every singular value in [lower, 1] is within `tolerance` of 1.

    All but the last are damped: x is divided by 1 + safety first, so that values which rounding has pushed above the
    interval do not grow with the fifth power.
    Raises ValueError unless 0 < lower <= 1 and tolerance > 0.
    """
    if not (0 < lower <= 1 and tolerance > 0):
        raise ValueError(f"schedule: expected 0 < lower <= 1 and tolerance > 0, got {lower} and {tolerance}")
    steps: list[Step] = []
    upper = 1.0
    while True:
        step = Step(*quintic(lower, upper), lower)
        if 1 - step(lower) <= tolerance:
            return (*steps, step)
        damping = 1 + safety
        step = Step(step.a / damping, step.b / damping**3, step.c / damping**5, lower)
        steps.append(step)
        lower = step(lower)
        upper = 2 - lower


def quintic(lower: float, upper: float) -> tuple[float, float, float]:
    """(a, b, c) of the odd quintic with the least max |1 - p(x)| for x in [lower, upper]; 0 < lower <= upper.

    Remez: 1 - p takes its extreme value with alternating signs at both ends and at the two extrema of p between them.
    """
    t = lower / upper
    if t > 1 - 5e-6:  # the system below becomes singular to rounding, and the limit is as good
        a, b, c = NEWTON_SCHULZ
    else:
        q, s = (3 * t + 1) / 4, (t + 3) / 4
        error = math.inf
        for _ in range(100):
            a, b, c, now = _alternating(t, q, s)
            root = math.sqrt(9 * b * b - 20 * a * c)
            q, s = math.sqrt((-3 * b - root) / (10 * c)), math.sqrt((-3 * b + root) / (10 * c))
            if abs(now - error) <= 1e-15:
                break
            error = now
    return a / upper, b / upper**3, c / upper**5


def _alternating(*points: float) -> tuple[float, float, float, float]:
    """(a, b, c, E) with a x + b x³ + c x⁵ = 1 - E, 1 + E, 1 - E, 1 + E at the three points and at 1.

    Solved for x (α + β z + γ z²), z = x² - 1: in powers of x the points of a narrow interval lose half the digits.
    """
    rows = []
    for x, sign in zip((*points, 1.0), (1, -1, 1, -1), strict=True):
        z = (x - 1) * (x + 1)
        rows.append([x, x * z, x * z * z, sign, 1.0])
    for i in range(4):
        pivot = max(range(i, 4), key=lambda j: abs(rows[j][i]))
        rows[i], rows[pivot] = rows[pivot], rows[i]
        for j in range(4):
            if j != i:
                ratio = rows[j][i] / rows[i][i]
                rows[j] = [y - ratio * x for x, y in zip(rows[i], rows[j], strict=True)]
    alpha, beta, gamma, error = (row[4] / row[i] for i, row in enumerate(rows))
    return alpha - beta + gamma, beta - 2 * gamma, gamma, error
