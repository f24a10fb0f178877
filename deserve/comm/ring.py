"""The links of a rank: the ring that plans, hidden states and sampled tokens travel."""

from dataclasses import dataclass

import torch
import torch.distributed as dist

from deserve.batch import MOST_LOGPROBS, VisitPlan, VisitResult, beside_width
from deserve.comm.coding import CodingSender, DecodingReceiver, coded_bytes
from deserve.comm.gloo import GlooReceiver, GlooSender
from deserve.comm.link import Loopback, Receiver, Sender
from deserve.comm.nccl import NcclReceiver, NcclSender
from deserve.comm.network import Wire, far_links, is_simulated
from deserve.comm.outbox import Outbox
from deserve.comm.world import Ring, World
from deserve.config import Config
from deserve.layout import Layout

PLANS, HIDDEN, TOKENS = 1, 2, 3  # message tags: what shares an edge is told apart by them


@dataclass(frozen=True)
class Links:
    """What connects a rank to its neighbours. A ring's first rank gets its plans from the controller, the last forwards
    none.

    `output` takes hidden states to the next rank, or from the last rank sampled tokens to the first, where `tokens_in`
    receives them.
    """

    plans_in: Receiver | None
    plans_out: Sender | None
    hidden_in: Receiver | None
    output: Sender
    tokens_in: Receiver | None


def connect(
    world: World,
    config: Config,
    layout: Layout,
    hidden: int,
    dtype: torch.dtype,
    device: torch.device,
    ring: Ring | None = None,
) -> Links:
    """The links of this rank in `ring` (None: all ranks are one). Every rank calls it.

    Hidden states have `hidden` elements of `dtype` and lie on `device`.

    Plans and sampled tokens are the hosts' and go over Gloo. Hidden states of GPUs go over NCCL where both ranks are on
    one host (`comm.backend=nccl`: everywhere, `gloo`: nowhere), elsewhere over Gloo by way of pinned memory. With
    `comm.activations=fp8` they are coded between hosts. What
    leaves a rank shares one simulated wire, as it would share a real one.
    """
    ring = ring or world.ring()
    coded = coded_links(world, config)
    edges = nccl_edges(world, config, device)
    if ring.size == 1:
        loop = Loopback()
        return Links(None, None, None, _from(device, loop, world), loop)
    network = config.network
    wire = Wire(network.latency_ms, network.bandwidth_mbps) if is_simulated(network) else None
    before, after = ring.before, ring.after
    depth = layout.rounds + 1
    first, last = ring.rank == 0, ring.is_last
    plan_bytes = 4 * VisitPlan.max_words(
        layout.concurrency,
        layout.main_pages + layout.swap_pages,
        layout.max_batch_tokens,
        layout.sliding_pages > 0,
    )
    result_bytes = 4 * VisitResult.max_words(layout.max_batch_tokens, beside_width(MOST_LOGPROBS))
    token_bytes = coded_bytes(hidden) if coded[before] else hidden * dtype.itemsize
    most_hidden = layout.max_batch_tokens * token_bytes
    hidden_in: Receiver | None = None
    output: Sender
    edge_in, edge_out = edges[before], edges[world.rank]
    # NCCL's ends meet when they are made: whichever of an edge is made first waits for the other.
    if last:
        output = _from(device, GlooSender(after, TOKENS, depth, wire), world)
    elif edge_out is not None:
        notices_out = GlooSender(after, HIDDEN, depth, wire)
        output = NcclSender(after, edge_out, notices_out, device, world.end_with)
    else:
        output = _from(device, GlooSender(after, HIDDEN, depth, wire), world)
    if not first and edge_in is not None:
        notices_in = GlooReceiver(before, HIDDEN, 8, ahead=layout.rounds)
        hidden_in = NcclReceiver(before, edge_in, notices_in, most_hidden, layout.rounds, device, world.end_with)
    elif not first:
        pinned = device.type == "cuda"
        hidden_in = GlooReceiver(before, HIDDEN, most_hidden, ahead=layout.rounds, pinned=pinned)
    if coded[world.rank] and not last:
        output = CodingSender(output)
    if hidden_in is not None and coded[before]:
        hidden_in = DecodingReceiver(hidden_in, hidden, dtype, device)
    return Links(
        plans_in=None if first else GlooReceiver(before, PLANS, plan_bytes, ahead=layout.rounds),
        plans_out=None if last else GlooSender(after, PLANS, depth, wire),
        hidden_in=hidden_in,
        output=output,
        tokens_in=GlooReceiver(before, TOKENS, result_bytes) if first else None,
    )


def coded_links(world: World, config: Config) -> list[bool]:
    """By rank, whether hidden states are coded on the link to the next one; the last rank sends none."""
    far = far_links(config.network, world.hosts)
    return [config.comm.activations == "fp8" and crosses for crosses in far[:-1]] + [False]


def nccl_edges(world: World, config: Config, device: torch.device) -> list[dist.ProcessGroup | None]:
    """By rank, the group of the NCCL link to the next one; None where there is no such link. Every rank calls it."""
    if device.type != "cuda" or config.comm.backend == "gloo":
        return [None] * world.size
    return world.nccl_edges(everywhere=config.comm.backend == "nccl")


def _from(device: torch.device, sender: Sender, world: World) -> Sender:
    """`sender` for payloads that lie on `device`."""
    return Outbox(sender, world.end_with) if device.type == "cuda" else sender
