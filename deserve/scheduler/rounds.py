"""Which sequences are in which round, and their moves: into a round, out to wait, back, and to another round."""

import heapq
from collections import deque
from dataclasses import dataclass, field

import numpy as np

from deserve.batch import IntArray
from deserve.layout import READS
from deserve.scheduler.pages import Pages
from deserve.scheduler.prefixes import Chain
from deserve.scheduler.sequences import Bools, Sequences


@dataclass
class Awaited:
    """What a visit under way samples: `samples` [rows] tokens for each of `slots` [rows].

    `scores` [n, 2]: a slot, and how many tokens of its prompt are scored. `counts` [rows]: which rows still do. The
    sequence of one that does not had ended before the visit.
    """

    slots: IntArray
    samples: IntArray
    scores: IntArray
    counts: Bools

    def drop(self, slots: IntArray) -> None:
        """What is sampled for `slots` [n] will not be taken in."""
        self.counts &= ~np.isin(self.slots, slots)


@dataclass
class MicroBatch:
    """The sequences of a round, in the order in which they take turns, and its visits under way, oldest first."""

    slots: IntArray = field(default_factory=lambda: np.zeros(0, np.int32))
    under_way: deque[Awaited] = field(default_factory=deque)


@dataclass
class Moves:
    """What a visit does to pages before it computes: parts of the plan's sections of the same names."""

    page_writes: list[IntArray] = field(default_factory=list)
    found: int = 0  # of these, prefix pages
    stash: list[IntArray] = field(default_factory=list)
    copies: list[IntArray] = field(default_factory=list)
    restore: list[IntArray] = field(default_factory=list)


@dataclass
class Counters:
    """What memory pressure and the end of the job have moved so far."""

    suspensions: int = 0
    resumptions: int = 0
    recomputed_tokens: int = 0
    moved_to_other_rounds: int = 0


class Rounds:
    """The micro-batches, and the sequences that wait outside, oldest first.

    A sequence that waits is suspended (its tokens lie in the host pool) or requeued (none of it is computed).
    """

    def __init__(self, rounds: int, size: int, sequences: Sequences, pages: Pages):
        """`size`: the most sequences of a micro-batch."""
        self.size, self._sequences, self._pages = size, sequences, pages
        self.batches = [MicroBatch() for _ in range(rounds)]
        self.open = np.ones(rounds, bool)  # rounds that have not retired
        self.counters = Counters()
        self._waiting: list[tuple[int, int]] = []  # heap of (age, slot)
        self._chains: dict[int, Chain] = {}  # of those that wait, where it was asked for

    @property
    def waiting(self) -> int:
        """Sequences in flight that are in no round."""
        return len(self._waiting)

    def growth(self, round_: int) -> int:
        """Pages that the round's sequences need for all their tokens, beyond those they own."""
        slots = self.batches[round_].slots
        return self._pages.growth(slots, self._sequences.length[slots])

    def has_place(self, round_: int) -> bool:
        """Whether the round may have one more sequence."""
        return len(self.batches[round_].slots) < self.size

    def enter(self, round_: int, slot: int) -> None:
        """Put the sequence in `slot` last in the round."""
        batch = self.batches[round_]
        batch.slots = np.append(batch.slots, np.int32(slot))
        self._pages.worst[round_] += self._worst(slot)

    def place(
        self,
        round_: int,
        slot: int,
        chain: Chain,
        found: IntArray,
        again: int | None,
        moves: Moves,
        copied: tuple[int, int] = (0, 0),
    ) -> None:
        """Put the sequence in `slot` last in the round and give it pages: the prefix pages `found`, and the others.

        `again` and `copied` as in `Pages.begin`.
        """
        self.enter(round_, slot)
        end = int(self._sequences.end[slot]) - 1
        moves.page_writes.append(self._pages.begin(round_, slot, end, chain, found, again, copied))
        if copied[1]:
            moves.copies.append(self._pages.copy(copied[0], slot))
        moves.found += len(found)
        moves.page_writes.append(self._pages.grow(round_, np.array([slot]), self._sequences.length[[slot]]))

    def may_read(self, round_: int, found: int, moves: Moves) -> bool:
        """Whether one more sequence of the round may read `found` prefix pages: as far as buffers are made for."""
        reach = self._pages.reach
        read = int(self._pages.found[self.batches[round_].slots].sum())
        return read + found <= (READS - 1) * reach and moves.found + found <= reach

    def leave(self, round_: int, slot: int) -> None:
        """Take the sequence in `slot` out of the round; its pages stay its own."""
        batch = self.batches[round_]
        batch.slots = batch.slots[batch.slots != slot]
        self._pages.worst[round_] -= self._worst(slot)

    def _worst(self, slot: int) -> int:
        return self._pages.private(slot, int(self._sequences.end[slot]) - 1)

    # -- memory pressure

    def make_room(self, round_: int, moves: Moves) -> bool:
        """Suspend sequences, least work first, until the others of the round find pages for their next token.

        The oldest of them stays, so it always gets on. Returns whether any was suspended.
        """
        crowded = False
        sequences, batch = self._sequences, self.batches[round_]
        while self.growth(round_) > self._pages.free(round_):
            oldest = batch.slots[np.argmin(sequences.age[batch.slots])]
            victims = batch.slots[batch.slots != oldest] if len(batch.slots) > 1 else batch.slots
            self._suspend(round_, int(victims[np.argmin(sequences.computed[victims])]), moves)
            crowded = True
        return crowded

    def _suspend(self, round_: int, slot: int, moves: Moves) -> None:
        """Move the sequence to the host pool. If that is full, its tokens are computed again."""
        computed = int(self._sequences.computed[slot])
        if self._pages.private(slot, computed) > self._pages.host.free_pages:
            self.requeue(round_, slot)
            return
        moves.stash.append(self._pages.stash(round_, slot, computed))
        self._wait(round_, slot)
        self.counters.suspensions += 1

    def requeue(self, round_: int, slot: int) -> None:
        """Give up the sequence's pages: it waits to be computed anew, prompt and output so far."""
        self.counters.recomputed_tokens += int(self._sequences.computed[slot])
        self._sequences.computed[slot] = 0
        self._pages.release(round_, slot)
        self._wait(round_, slot)

    def requeue_all(self) -> None:
        """Requeue every sequence in flight, as if all KV memory were lost. What is awaited will not be taken in."""
        for round_, batch in enumerate(self.batches):
            batch.under_way.clear()
            self._sequences.withdraw(batch.slots)
            for slot in batch.slots.tolist():
                self.requeue(round_, slot)
        for _, slot in self._waiting:
            self._pages.forget(slot)
            self.counters.recomputed_tokens += int(self._sequences.computed[slot])
            self._sequences.computed[slot] = 0
        self._pages.forget_prefixes()

    def _wait(self, round_: int, slot: int) -> None:
        self.leave(round_, slot)
        heapq.heappush(self._waiting, (int(self._sequences.age[slot]), slot))

    def resume(self, round_: int, moves: Moves) -> None:
        """Bring back sequences that wait, oldest first, while there is room for them and a page to grow into."""
        sequences, pages, batch = self._sequences, self._pages, self.batches[round_]
        while self._waiting and self.has_place(round_):
            slot = self._waiting[0][1]
            if slot not in self._chains:
                self._chains[slot] = pages.chain(sequences.request(slot))
            chain, found = self._chains[slot], self._found(slot)
            read = len(found) - pages.unread(found)
            needed = pages.count(int(sequences.length[slot])) - read + self.growth(round_) + len(batch.slots)
            if min(needed, pages.reach) > pages.free(round_) or not self.may_read(round_, len(found), moves):
                return
            # Nothing in the host pool is kept for a requeued sequence: it comes in as a new one does.
            stashed = pages.stashed(slot)
            if not stashed and not pages.affords(round_, int(sequences.end[slot]) - 1, read):
                return
            heapq.heappop(self._waiting)
            del self._chains[slot]
            self.place(round_, slot, chain, found, None, moves)
            if stashed:
                moves.restore.append(pages.restore(slot))
                self.counters.resumptions += 1
            else:
                sequences.computed[slot] = len(found) * pages.page_size

    def _found(self, slot: int) -> IntArray:
        """The prefix pages with which the sequence in `slot`, which waits, may go on.

        If one is gone that comes before its host pages, the sequence is requeued.
        """
        chain, pages = self._chains[slot], self._pages
        if pages.stashed(slot):
            shared = pages.shared_before_stash(slot)
            found = pages.prefixes.find(chain, shared)
            if len(found) == shared:
                return found
            pages.forget(slot)
            self.counters.recomputed_tokens += int(self._sequences.computed[slot])
            self._sequences.computed[slot] = 0
        return pages.find(chain)

    # -- the end

    def close(self, round_: int, moves: Moves) -> bool:
        """Hand the round's sequences, of which none awaits a token, to the other open rounds, the emptiest first.

        Main pages are the same in all rounds, so whoever holds nothing else just moves. The others are suspended, to be
        resumed in another round. Returns False, and does nothing, unless all sequences in flight would then fit on the
        GPU to their ends and the host pool takes those that are suspended.
        """
        pages, batch = self._pages, self.batches[round_]
        others = [index for index in np.flatnonzero(self.open).tolist() if index != round_]
        rows = {index: len(self.batches[index].slots) for index in others}
        found = {index: int(pages.found[self.batches[index].slots].sum()) for index in others}
        worst = pages.worst.copy()
        moving, worst[round_] = worst[round_], 0
        if pages.overshoot(worst) + moving + sum(self._worst(slot) for _, slot in self._waiting) > 0:
            return False
        movers: list[tuple[int, int]] = []
        stashed = 0
        for slot in batch.slots.tolist():
            if pages.movable(slot):
                to = min(others, key=rows.__getitem__)
                rows[to] += 1
                found[to] += int(pages.found[slot])
                if rows[to] > self.size or found[to] > (READS - 1) * pages.reach:
                    return False
                movers.append((slot, to))
            else:
                stashed += pages.private(slot, int(self._sequences.computed[slot]))
        if stashed > pages.host.free_pages:
            return False
        for slot, to in movers:
            self.leave(round_, slot)
            self.enter(to, slot)
        self.counters.moved_to_other_rounds += len(batch.slots) + len(movers)
        for slot in batch.slots.tolist():
            self._suspend(round_, slot, moves)
        self.open[round_] = False
        return True

    def drop_all(self) -> None:
        """Take every sequence out of flight, unfinished as it is."""
        for round_, batch in enumerate(self.batches):
            batch.under_way.clear()
            for slot in batch.slots.tolist():
                self._pages.release(round_, slot)
                self._wait(round_, slot)
        for _, slot in self._waiting:
            self._pages.forget(slot)
            self._sequences.remove(slot)
        self._waiting.clear()
        self._chains.clear()
