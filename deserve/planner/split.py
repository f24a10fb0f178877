"""Splits a model's layers across ranks, so that the rank with the most to bear has as little as can be."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]


def best_split(costs: Sequence[FloatArray]) -> tuple[int, ...]:
    """The first layer of each rank, in that of all contiguous splits whose largest cost is least.

    costs: of each rank [layers, layers + 1], what layers i to j (exclusive) cost it. Every rank gets a layer at least.
    Among splits with the same largest cost, the one whose costs have the least sum of squares; then the one
    whose last ranks have the fewest layers.
    """
    layers = len(costs[0])
    some = np.arange(layers)[:, None] < np.arange(layers + 1)
    costs = [np.where(some, cost, np.inf) for cost in costs]
    least = costs[0][0]  # of the ranks so far, by the layers that they hold
    for cost in costs[1:]:
        least = np.maximum(least[:-1, None], cost).min(0)
    most = least[-1] * (1 + 1e-9)
    squares = [np.where(cost <= most, cost, np.inf) ** 2 for cost in costs]
    total, firsts = squares[0][0], []
    for square in squares[1:]:
        sums = total[:-1, None] + square
        firsts.append(layers - 1 - sums[::-1].argmin(0))
        total = sums.min(0)
    split, end = [0] * len(costs), layers
    for rank in range(len(costs) - 1, 0, -1):
        end = split[rank] = int(firsts[rank - 1][end])
    return tuple(split)
