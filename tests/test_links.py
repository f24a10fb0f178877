"""The links and the simulated network, between two processes.

Upper bounds hold for the best of several tries, as other programs may hold a process up. The lower ones hold always:
a simulation must never be faster than the network it stands for.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from launch import torchrun
from link_worker import LATENCY_MS, SHARED

from deserve.comm.link import Loopback, frame, unframe
from deserve.comm.network import Wire


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("links") / "found.json"
    done = torchrun(2, Path(__file__).with_name("link_worker.py"), path)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(path.read_text())


def test_a_round_trip_takes_two_latencies(found: dict[str, Any]) -> None:
    assert min(found["round_trips_ms"]) >= 2 * LATENCY_MS
    assert min(found["round_trips_ms"]) <= 2 * LATENCY_MS + 1


def test_messages_overlap_on_the_wire(found: dict[str, Any]) -> None:
    latency = LATENCY_MS / 1e3
    for sent, arrived in zip(found["sent"], found["arrived"], strict=True):
        assert all(late - early >= latency for early, late in zip(sent, arrived, strict=True))
    last = [arrived[-1] - sent[0] for sent, arrived in zip(found["sent"], found["arrived"], strict=True)]
    assert min(last) < latency + 0.005


def test_bandwidth_is_shared_out_byte_by_byte(found: dict[str, Any]) -> None:
    seconds = found["large_arrived"] - found["large_sent"]
    assert 0.8 + LATENCY_MS / 1e3 <= seconds < 0.8 + LATENCY_MS / 1e3 + 0.25


def test_all_ranks_learn_alike_how_soon_a_visit_follows_another(found: dict[str, Any]) -> None:
    assert 0 < found["start_0"] == found["start_1"]
    assert found["no_start_0"] == found["no_start_1"] == 0


def test_frames_arrive_whole_and_in_order_and_close_leaves_none(found: dict[str, Any]) -> None:
    for rank in (0, 1):
        assert found[f"whole_and_in_order_{rank}"]
        assert found[f"pending_{rank}"] == 0


def test_large_values_are_shared(found: dict[str, Any]) -> None:
    assert found["shared_0"] == found["shared_1"] == SHARED


def test_messages_queue_for_the_bandwidth() -> None:
    wire = Wire(latency_ms=10, bandwidth_mbps=8)  # a byte takes 1 us
    first, second = wire.deliver_at(1000), wire.deliver_at(500)
    assert second - first == 500_000
    assert Wire(10, None).deliver_at(10**9) - Wire(10, None).deliver_at(0) < 1_000_000


def test_a_frame_needs_no_wire() -> None:
    payload, deliver_at = unframe(frame(torch.arange(3, dtype=torch.int32), None))
    assert payload.view(torch.int32).tolist() == [0, 1, 2] and deliver_at == 0


def test_a_ring_of_one_keeps_what_it_is_given() -> None:
    loop = Loopback()
    tensor = torch.tensor([1, 2], dtype=torch.int32)
    loop.send(tensor)
    tensor.zero_()  # the sender may use its memory again
    loop.send(torch.empty(0, dtype=torch.int32))
    assert loop.receive().view(torch.int32).tolist() == [1, 2]
    assert loop.receive().tolist() == []
