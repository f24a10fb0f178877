"""The links and the simulated network, between two processes.

Lower bounds hold always: a simulation must never be faster than the network it stands for. The upper ones tell one
latency, or one transfer, from two: other programs may hold a process up. A clock of the test shows the exact times.
"""

import json
import queue
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from launch import run_ranks
from link_worker import LARGE_BYTES, LATENCY_MS, SHARED

from deserve.comm import nccl, outbox
from deserve.comm.coding import coded_bytes, decode, encode
from deserve.comm.host import Host
from deserve.comm.link import Loopback, Receiver, Sender, frame, unframe
from deserve.comm.nccl import NcclReceiver, NcclSender
from deserve.comm.network import Wire, far_links, hold_until, require_far_links, require_one_host
from deserve.comm.outbox import Outbox
from deserve.config import NetworkSection, load_config
from deserve.errors import LinkError, UserError


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("links") / "found.json"
    done = run_ranks(2, "link_worker.py", path)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(path.read_text())


def test_a_round_trip_takes_two_latencies(found: dict[str, Any]) -> None:
    assert min(found["round_trips_ms"]) >= 2 * LATENCY_MS
    assert min(found["round_trips_ms"]) < 3 * LATENCY_MS


def test_messages_overlap_on_the_wire(found: dict[str, Any]) -> None:
    latency = LATENCY_MS / 1e3
    for sent, arrived in zip(found["sent"], found["arrived"], strict=True):
        assert all(late - early >= latency for early, late in zip(sent, arrived, strict=True))
    last = [arrived[-1] - sent[0] for sent, arrived in zip(found["sent"], found["arrived"], strict=True)]
    assert min(last) < 2 * latency  # of ten messages


def test_bandwidth_is_shared_out_byte_by_byte(found: dict[str, Any]) -> None:
    took = [late - early for early, late in zip(found["large_sent"], found["large_arrived"], strict=True)]
    transfer_s = LARGE_BYTES * 8 / 100e6
    assert transfer_s + LATENCY_MS / 1e3 <= min(took) < 2 * transfer_s


def test_frames_arrive_whole_and_in_order_and_close_leaves_none(found: dict[str, Any]) -> None:
    for rank in (0, 1):
        assert found[f"whole_and_in_order_{rank}"]
        assert found[f"pending_{rank}"] == 0


def test_large_values_are_shared(found: dict[str, Any]) -> None:
    assert found["shared_0"] == found["shared_1"] == SHARED


def test_messages_queue_for_the_bandwidth_and_overlap_in_the_latency(monkeypatch: pytest.MonkeyPatch) -> None:
    ms, now, slept = 1_000_000, 5_000_000, []
    monkeypatch.setattr("time.monotonic_ns", lambda: now)
    monkeypatch.setattr("time.sleep", slept.append)
    thin, wide = Wire(latency_ms=10, bandwidth_mbps=8), Wire(10, None)  # a byte takes 1 us
    assert [thin.deliver_at(1000), thin.deliver_at(500)] == [now + 11 * ms, now + 11 * ms + ms // 2]
    assert [wide.deliver_at(10**9), wide.deliver_at(0)] == [now + 10 * ms] * 2
    now += 1000 * ms
    assert thin.deliver_at(0) == now + 10 * ms
    assert (hold_until(now + 20 * ms), hold_until(now), hold_until(now - ms)) == (0.02, 0, 0) and slept == [0.02]


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


def test_a_network_between_hosts_is_not_simulated() -> None:
    """Frames carry the sender's CLOCK_MONOTONIC, which counts from the boot of its host."""
    here, there = Host("boot 1", "near"), Host("boot 2", "far")
    require_one_host(NetworkSection(latency_ms=64), [here, here])
    require_one_host(NetworkSection(), [here, there])
    for network in (NetworkSection(latency_ms=64), NetworkSection(bandwidth_mbps=100)):
        with pytest.raises(UserError, match=r"network\.latency_ms.*2 hosts \(near, far\)"):
            require_one_host(network, [here, there, there])


def test_only_links_between_hosts_are_coded() -> None:
    here, there = Host("boot 1", "near"), Host("boot 2", "far")
    assert far_links(NetworkSection(), [here, here, there]) == [False, True, True]
    assert far_links(NetworkSection(latency_ms=1), [here] * 3) == [True] * 3  # it stands for a network between hosts
    config = load_config(["comm.activations=fp8"])
    require_far_links(config, [here, there])
    require_far_links(replace(config, network=NetworkSection(bandwidth_mbps=20)), [here, here])
    require_far_links(load_config([]), [here])
    for hosts, words in (([here], "one rank"), ([here, here], "all 2 ranks are on near")):
        with pytest.raises(UserError, match=rf"comm\.activations=fp8 .*{words}"):
            require_far_links(config, hosts)


@given(data=st.data())
def test_coded_hidden_states_keep_their_first_three_bits(data: st.DataObject) -> None:
    """Relative to each element, or to the largest of its token where that is much larger."""
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    numbers = st.floats(width=16 if dtype == torch.float16 else 32) | st.sampled_from([0.0, 1e-30, 1e-42, 3e38])
    rows = data.draw(st.lists(st.lists(numbers, min_size=5, max_size=5), min_size=1, max_size=4))
    x = torch.tensor(rows, dtype=torch.float64).to(dtype)
    payload = encode(x)
    assert payload.dtype == torch.uint8 and len(payload) == len(rows) * coded_bytes(5)
    decoded = decode(payload, 5, dtype)
    finite = x.isfinite().all(1)
    assert decoded[~finite].isnan().all()
    exact, largest = x[finite].double(), x[finite].double().abs().amax(1, keepdim=True)
    off = (decoded[finite].double() - exact).abs()
    eps = torch.finfo(dtype)
    # Half of the last of three bits; below e4m3's normal numbers, half of the smallest one.
    allowed = exact.abs() / 2**4 + largest / 448 / 2**10 + eps.eps * exact.abs() + eps.tiny
    assert (off <= allowed).all()
    each = torch.cat([decode(encode(row[None]), 5, dtype) for row in x])
    assert torch.equal(each.isnan(), decoded.isnan()) and torch.equal(each.nan_to_num(), decoded.nan_to_num())


class Unplugged:
    """The host's end of a link that fails."""

    def __init__(self, error: BaseException):
        self._error = error

    def send(self, payload: torch.Tensor, beside: int = 0) -> None:
        raise self._error

    def take(self) -> None:
        raise self._error


ERRORS = [LinkError("link to rank 1 is lost"), RuntimeError("NCCL error"), ValueError("any other"), MemoryError()]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("kind", [Outbox, NcclSender, NcclReceiver])
def test_a_failing_thread_of_a_link_ends_the_job_itself(
    monkeypatch: pytest.MonkeyPatch, kind: type[Sender | Receiver], error: BaseException
) -> None:
    """With one round the main thread has sent its last frame, and waits for one that can no longer come."""
    cuda = MagicMock()
    for module in (nccl, outbox):
        monkeypatch.setattr(module.torch, "cuda", cuda)
    monkeypatch.setattr(nccl, "dist", MagicMock())
    monkeypatch.setattr(nccl, "WARM_UP_BYTES", 0)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, pin_memory=False, **options: empty(*size, **options))
    failures: queue.Queue[BaseException] = queue.Queue()
    device, end = torch.device("cpu"), Unplugged(error)
    links: dict[type, Callable[[], Any]] = {
        Outbox: lambda: Outbox(end, failures.put),
        NcclSender: lambda: NcclSender(1, MagicMock(), end, device, failures.put),
        NcclReceiver: lambda: NcclReceiver(1, MagicMock(), end, 8, 1, device, failures.put),
    }
    link = links[kind]()
    if isinstance(link, Sender):
        link.send(torch.zeros(2))
    found = failures.get(timeout=30)
    if isinstance(error, RuntimeError) and kind is not Outbox:
        assert isinstance(found, LinkError) and "rank 1" in str(found) and "NCCL error" in str(found)
    else:
        assert found is error
