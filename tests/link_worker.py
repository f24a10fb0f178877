"""Two ranks that try out the links between them: `link_worker.py FILE` writes what was measured to FILE, as JSON."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from deserve.comm.gloo import GlooReceiver, GlooSender
from deserve.comm.network import Wire
from deserve.comm.world import World

SHARED = 20_000_000
LATENCY_MS = 32
TRIES = 12
LARGE_BYTES, LARGE_TRIES = 2_500_000, 5


def ping_pong(world: World) -> dict[str, Any]:
    """Round trips of one small message, in ms."""
    other = 1 - world.rank
    sender = GlooSender(other, 11, 2, Wire(LATENCY_MS, None))
    receiver = GlooReceiver(other, 11, 64, ahead=TRIES)
    trips = []
    for _ in range(TRIES):
        begin = time.monotonic()
        if world.rank == 0:
            sender.send(torch.zeros(4))
            receiver.receive()
        else:
            receiver.receive()
            sender.send(torch.zeros(4))
        trips.append((time.monotonic() - begin) * 1e3)
    sender.close()
    return {"round_trips_ms": trips if world.rank == 0 else []}


def burst(world: World) -> dict[str, Any]:
    """Ten messages back to back, several times over: when the first and the last was sent and each arrived, in s."""
    sent, arrived = [], []
    for index in range(TRIES):
        world.share(f"burst/{index}", None)  # nobody sends before the receives are posted
        if world.rank == 0:
            sender = GlooSender(1, 20, 10, Wire(LATENCY_MS, None))
            world.receive(1, f"posted/{index}")
            times = []
            for _ in range(10):
                times.append(time.monotonic())
                sender.send(torch.zeros(100))
            sent.append(times)
            sender.close()
        else:
            receiver = GlooReceiver(0, 20, 400, ahead=10)
            world.send(0, f"posted/{index}", True)
            times = []
            for _ in range(10):
                receiver.receive()
                times.append(time.monotonic())
            arrived.append(times)
    return {"sent": sent, "arrived": arrived}


def large(world: World) -> dict[str, Any]:
    """When `LARGE_BYTES` over 100 Mbit/s were sent and arrived, several times over, in s."""
    sent, arrived = [], []
    for index in range(LARGE_TRIES):
        if world.rank == 0:
            sender = GlooSender(1, 30, 1, Wire(LATENCY_MS, 100))
            world.receive(1, f"large/{index}")
            sent.append(time.monotonic())
            sender.send(torch.zeros(LARGE_BYTES, dtype=torch.uint8))
            sender.close()
        else:
            receiver = GlooReceiver(0, 30, LARGE_BYTES, ahead=1)
            world.send(0, f"large/{index}", True)
            assert len(receiver.receive()) == LARGE_BYTES
            arrived.append(time.monotonic())
    return {"large_sent": sent, "large_arrived": arrived}


def in_order(world: World) -> dict[str, Any]:
    """Frames of many sizes, each full of its number, both ways at once and under two tags: all in order and whole."""
    other, count, depth = 1 - world.rank, 300, 8
    wire = Wire(1, None)
    senders = [GlooSender(other, tag, depth, wire) for tag in (40, 41)]
    receivers = [GlooReceiver(other, tag, 200_000, ahead=depth) for tag in (40, 41)]
    sizes = torch.randint(0, 50_000, (count,), generator=torch.Generator().manual_seed(0)).tolist()
    sizes[::7] = [0] * len(sizes[::7])
    whole = True
    for index in range(count + depth):
        for sender in senders:
            if index < count:
                sender.send(torch.full((sizes[index],), index, dtype=torch.int32))
        if index < depth:
            continue
        for receiver in receivers:
            payload = receiver.receive().view(torch.int32)
            number = index - depth
            whole &= len(payload) == sizes[number] and bool((payload == number).all())
            if index < count:
                receiver.expect()
    for sender in senders:
        sender.close()
    pending = sum(len(sender._unfinished) for sender in senders) + sum(len(receiver._posted) for receiver in receivers)
    return {f"whole_and_in_order_{world.rank}": whole, f"pending_{world.rank}": pending}


if __name__ == "__main__":
    world = World()
    found = ping_pong(world) | burst(world) | large(world) | in_order(world)
    found[f"shared_{world.rank}"] = len(world.share("long text", "x" * SHARED))  # as a long trace is
    everything = world.gather("found", found)
    if world.rank == 0:
        first, second = everything
        merged = first | {key: value for key, value in second.items() if value or key not in first}
        Path(sys.argv[1]).write_text(json.dumps(merged))
    world.leave()
