"""What the swap slab decides without a device: which pages travel, and how long a visit waited for them."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deserve.kvcache.slab import SwapSlab, _Visit, _waited, runs_of
from deserve.layout import slab_slots

NOBODY = np.zeros(0, np.int32)


@given(st.sets(st.integers(0, 200), min_size=1), st.integers(1, 30))
def test_runs_cover_the_pages_and_no_wide_gap(pages: set[int], gap: int) -> None:
    runs = list(runs_of(np.array(sorted(pages)), gap))
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
    return _Visit(At(begin), {layer: At(ms) for layer, ms in enumerate(loaded)}, At(end))


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
    assert _waited(visit(0, loaded, end), 4) == pytest.approx(waited / 1e3)


class Rounds:
    """A slab of three layers, of which two have room, and the visits of two rounds."""

    LAYERS = 3

    def __init__(self) -> None:
        self.memory = torch.zeros(slab_slots(self.LAYERS), 4, 2, 4, 1, 8)
        self.slab = SwapSlab(self.memory, self.LAYERS, rounds=2, max_tokens=16)
        self.page_bytes = self.memory[0, 0].nbytes

    def visit(self, round_: int, read: list[int], page: int, offset: int, restored: list[int] | None = None) -> list:
        """A visit that reads pages and writes a token; what it found in the pages, by layer."""
        slab, found = self.slab, []
        pages = np.array(read, np.int32)
        slab.enter(round_, pages, np.array(restored or [], np.int32), np.array([page]), np.array([offset]))
        for layer in range(self.LAYERS):
            slab.await_layer(layer)
            found.append(self.memory[layer % 2][pages].clone())
            self.memory[layer % 2][page, :, offset] = 100 * layer + 10 * round_ + offset + 1
            slab.leave_layer(layer, 1)
            slab.follow(range(layer, layer + 1))
        slab.join()
        slab.leave(1 - round_)
        return found

    def empty(self, round_: int) -> None:
        """A visit of nobody."""
        self.slab.enter(round_, NOBODY, NOBODY, NOBODY, NOBODY)
        self.slab.leave(1 - round_)


def test_a_page_travels_as_long_as_it_is_in_use() -> None:
    rounds = Rounds()
    slab, layers = rounds.slab, Rounds.LAYERS
    rounds.visit(0, [], page=2, offset=0)
    assert slab.counters.bytes_in == 0
    rounds.visit(1, [], page=2, offset=0)
    # Ahead of its visit, round 0's page comes in for the first two layers.
    assert slab.counters.bytes_in == 2 * rounds.page_bytes
    found = rounds.visit(0, [2], page=2, offset=1)
    assert slab.counters.bytes_in == (2 + 1 + 2) * rounds.page_bytes
    for layer in range(layers):
        assert (found[layer][0, :, 0] == 100 * layer + 1).all()
    found = rounds.visit(1, [2], page=3, offset=2)
    for layer in range(layers):
        assert (found[layer][0, :, 0] == 100 * layer + 11).all()
    found = rounds.visit(0, [2], page=2, offset=2)
    for layer in range(layers):
        assert (found[layer][0, :, :2] == 100 * layer + torch.tensor([1, 2])[:, None, None]).all()
    for _ in range(2):  # whose sequences have ended: nobody reads the pages any more
        rounds.empty(1)
        rounds.empty(0)
    before = slab.counters.bytes_in
    rounds.empty(1)
    rounds.empty(0)
    assert slab.counters.bytes_in == before


def test_what_is_put_into_host_memory_before_a_visit_is_read_in_it() -> None:
    rounds = Rounds()
    rounds.visit(0, [], page=1, offset=0)
    rounds.visit(1, [], page=1, offset=0)  # behind it page 1 of round 0 comes in
    for layer in range(Rounds.LAYERS):
        rounds.slab.host(0)[layer, 1] = -layer - 1.0
    found = rounds.visit(0, [1], page=1, offset=3, restored=[1])
    for layer in range(Rounds.LAYERS):
        assert (found[layer][0, :, 0] == -layer - 1).all()


def test_a_round_that_comes_again_at_once_finds_its_pages() -> None:
    rounds = Rounds()
    rounds.visit(0, [], page=1, offset=0)
    found = rounds.visit(0, [1], page=1, offset=1)
    for layer in range(Rounds.LAYERS):
        assert (found[layer][0, :, 0] == 100 * layer + 1).all()


@pytest.mark.parametrize(("layers", "slots"), [(1, 1), (2, 2), (3, 2), (4, 2), (5, 3), (40, 20)])
def test_the_slab_has_room_for_half_of_the_layers(layers: int, slots: int) -> None:
    assert slab_slots(layers) == slots
