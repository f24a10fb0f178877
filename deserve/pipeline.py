"""The loop that every rank runs: micro-batches visit the stages in turn, and many of them are under way at once."""

from collections import deque
from typing import Protocol

import torch

from deserve.batch import IntArray, VisitPlan
from deserve.comm.link import Receiver, Sender
from deserve.comm.ring import Links
from deserve.stage import Stage
from deserve.timeline import Timeline


class VisitSource(Protocol):
    """Rank 0's other half: it decides each visit."""

    def next_visit(self, micro_batch: int) -> tuple[VisitPlan, IntArray]:
        """The plan of the micro-batch's next visit and the token ids [T] that it embeds."""

    def close(self) -> None:
        """Take in what is still under way to rank 0."""


def run_pipeline(
    stage: Stage, links: Links, visits: VisitSource | None, rounds: int, hidden: int, timeline: Timeline
) -> None:
    """Visit the `rounds` micro-batches in turn until all have retired. `hidden` is the width of the hidden states.

    Every visit sends one frame on every link, however little is in it. The frames of the last visits, which retire
    the micro-batches, come round to rank 0 like all others, so when it returns every rank has done its part.
    """
    turn = deque(range(rounds))
    while turn:
        micro_batch = turn.popleft()
        if visits is not None:
            plan, tokens = visits.next_visit(micro_batch)
            x = torch.from_numpy(tokens)
        else:
            assert links.plans_in is not None and links.hidden_in is not None
            words = timeline.receive(links.plans_in, micro_batch).view(torch.int32)
            plan = VisitPlan.decode(words.numpy().copy())
        if links.plans_out is not None:
            with timeline.span("send", micro_batch):
                links.plans_out.send(torch.from_numpy(plan.encode()))
        if links.hidden_in is not None:
            x = timeline.receive(links.hidden_in, micro_batch).view(stage.dtype).view(-1, hidden)
        with timeline.on_device("compute", micro_batch):
            y = stage.forward(plan, x, timeline)
        with timeline.span("send", micro_batch):
            links.output.send(y)
        if not plan.retires:
            turn.append(micro_batch)
        stage.end_visit(turn[0] if turn else None, timeline)
        if not plan.retires:
            for link in (links.plans_in, links.hidden_in):
                if link is not None:
                    link.expect()
    ends: tuple[Receiver | Sender | None, ...] = (links.plans_in, links.plans_out, links.hidden_in, links.output)
    for end in ends:
        if end is not None:
            end.close()
    if visits is not None:
        visits.close()
    timeline.finish()
