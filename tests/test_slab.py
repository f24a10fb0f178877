"""What the swap slab decides without a device: which pages travel, and how long a visit waited for them."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deserve.kvcache.slab import SwapSlab, _runs, _Visit, _waited
from deserve.report.timeline import UNTIMED

NOBODY = np.zeros(0, np.int32)


@given(st.sets(st.integers(0, 200), min_size=1), st.integers(1, 30))
def test_runs_cover_the_pages_and_no_wide_gap(pages: set[int], gap: int) -> None:
    runs = list(_runs(np.array(sorted(pages)), gap))
    covered = [page for start, stop in runs for page in range(start, stop)]
    assert pages <= set(covered) and covered == sorted(set(covered))
    assert all(start in pages and stop - 1 in pages for start, stop in runs)
    assert all(second - first >= gap for (_, first), (second, _) in pairwise(runs))
    missing = [page for page in covered if page not in pages]
    assert not any(set(range(page, page + gap)) <= set(missing) for page in missing)


@dataclass
class At:
    """An event that has passed at `ms`."""

    ms: float

    def elapsed_time(self, other: "At") -> float:
        return other.ms - self.ms


def visit(begin: float, loaded: list[float], end: float) -> Any:
    return _Visit(At(begin), [At(ms) for ms in loaded], At(end))


@pytest.mark.parametrize(
    ("loaded", "end", "waited"),
    [
        ([], 10, 0),
        ([-5, -4, -3, -2], 12, 0),  # all there before it began
        ([0, 3, 6, 9], 12, 0),  # each just in time
        ([0, 3, 6, 14], 17, 5),  # 4 layers of 3 ms, the last one 5 ms late
        ([8, 8, 8, 8], 20, 8),  # all came at 8
    ],
)
def test_a_visit_waits_for_the_latest_layer(loaded: list[float], end: float, waited: float) -> None:
    assert _waited(visit(0, loaded, end)) == pytest.approx(waited / 1e3)


def test_a_page_travels_as_long_as_it_is_in_use() -> None:
    layers = torch.zeros(2, 8, 2, 4, 1, 8)
    slab = SwapSlab(layers, first=3, swap_pages=4, rounds=2, max_tokens=16)

    def write(round_: int, read: list[int], page: int, offset: int) -> None:
        """A visit that reads pages and writes a token."""
        slab.enter(round_, np.array(read, np.int32), np.array([page]), np.array([offset]), UNTIMED)
        layers[:, 3 + page, :, offset] = 10 * round_ + offset + 1
        for layer in range(2):
            slab.await_layer(layer)
            slab.leave_layer(layer, 1)
        slab.leave(1 - round_, UNTIMED)

    write(0, [], page=2, offset=0)
    write(1, [], page=2, offset=0)
    assert slab.bytes_in == 2 * layers[0, 0].nbytes  # round 0's page came in before its visit
    assert (layers[:, 5, :, 0] == 1).all()
    write(0, [2], page=2, offset=1)
    assert (layers[:, 5, :, 0] == 11).all()  # round 1's
    before = slab.bytes_in
    slab.enter(1, NOBODY, NOBODY, NOBODY, UNTIMED)
    slab.leave(0, UNTIMED)
    assert (layers[:, 5, :, :2] == torch.tensor([1, 2])[:, None, None]).all()
    assert slab.bytes_in == before + 2 * layers[0, 0].nbytes
    for _ in range(2):  # whose sequence has ended: nobody reads the page any more
        slab.enter(0, NOBODY, NOBODY, NOBODY, UNTIMED)
        slab.leave(1, UNTIMED)
        slab.enter(1, NOBODY, NOBODY, NOBODY, UNTIMED)
        slab.leave(0, UNTIMED)
    before = slab.bytes_in
    slab.enter(0, NOBODY, NOBODY, NOBODY, UNTIMED)
    slab.leave(1, UNTIMED)
    assert slab.bytes_in == before
