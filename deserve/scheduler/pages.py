"""Rank 0's account of pages: who owns which, on the GPU and in the host pool."""

import numpy as np

from deserve.batch import IntArray, Ints, Request
from deserve.kvcache.buddy import BuddyAllocator
from deserve.kvcache.pages import widen
from deserve.scheduler.ids import IdStack, spread
from deserve.scheduler.prefixes import Chain, Prefixes
from deserve.scheduler.sliding import SlidingPages


class Pages:
    """The pages of every rank at once, since page ids mean the same everywhere.

    Ids `0..main-1` are main pages, which all rounds share; `main..main+swap-1` are swap pages, of which each round has
    a set of its own under the same ids. A round fills its swap pages before it takes main pages: a swap page serves
    nobody else, a main page may help any round.

    `readers` counts the sequences that read each main page; at 0 it is free, or a prefix page that is kept until its
    place is needed. `worst` holds the pages that each round needs if all its sequences grow to their end, beside the
    prefix pages that they read: `shared` of each sequence, its first ones.
    """

    def __init__(
        self,
        main: int,
        swap: int,
        rounds: int,
        host_height: int,
        page_size: int,
        slots: int,
        *,
        shares: bool = True,
        switch: int = 0,
        sliding: SlidingPages | None = None,
    ):
        """Without `shares` there are no prefix pages. Prompts of more than `switch` tokens share none with others.

        `sliding`: the pages of layers with a window, where these have pages of their own.
        """
        self.main, self.swap, self.page_size = main, swap, page_size
        self._shares, self._switch, self.sliding = shares, switch, sliding
        self.prefixes = Prefixes(main, page_size)
        self.host = BuddyAllocator(host_height)
        self.readers = np.zeros(main, np.int32)
        self.worst = np.zeros(rounds, np.int64)
        self._free_main = IdStack(np.arange(main, dtype=np.int32))
        self._free_swap = [IdStack(np.arange(main, main + swap, dtype=np.int32)) for _ in range(rounds)]
        self._table = np.zeros((slots, 16), np.int32)
        self._held = np.zeros(slots, np.int64)
        self.shared, self.found = np.zeros((2, slots), np.int64)  # prefix pages of each, and those it did not compute
        self._pinned: list[int] = []  # prefix pages that the visit which is being planned copies
        self._writing: dict[int, tuple[Chain, int]] = {}  # slot: its chain, and up to where it adds prefix pages
        self._stashed: dict[int, tuple[int, IntArray]] = {}  # slot: prefix pages before them, and its host pages
        self._largest = 0  # pages of the largest sequence so far, at its end

    # -- counts

    def count(self, tokens: int) -> int:
        """Pages that hold `tokens` tokens."""
        return -(-tokens // self.page_size)

    @property
    def reach(self) -> int:
        """Pages that one round can own at most."""
        return self.main + self.swap

    def free(self, round_: int) -> int:
        """Pages that `round_` could take now."""
        return self.free_swap(round_) + self.free_main

    @property
    def free_main(self) -> int:
        """Main pages that nobody reads."""
        return len(self._free_main) + self.prefixes.unread

    @property
    def use(self) -> float:
        """The fraction of all pages, swap pages of every round among them, that sequences own or read."""
        free = self.free_main + sum(map(len, self._free_swap))
        return 1 - free / (self.main + self.swap * len(self._free_swap))

    def free_swap(self, round_: int) -> int:
        """Swap pages of `round_` that no sequence of it owns."""
        return len(self._free_swap[round_])

    def owned(self, slot: int) -> IntArray:
        """The pages of the sequence in `slot`, first tokens first."""
        return self._table[slot, : self._held[slot]]

    def growth(self, slots: Ints, tokens: Ints) -> int:
        """Pages that `slots` [rows] need for `tokens` [rows] tokens, beyond those they own."""
        return int(self._missing(slots, tokens).sum())

    def _missing(self, slots: Ints, tokens: Ints) -> Ints:
        return np.maximum(-(-tokens // self.page_size) - self._held[slots], 0)

    @property
    def all_free(self) -> bool:
        """Whether nobody owns a page."""
        swap_free = all(len(swap) == self.swap for swap in self._free_swap)
        sliding_free = self.sliding is None or self.sliding.all_free
        main_free = self.free_main == self.main and not self.readers.any()
        return swap_free and main_free and sliding_free and self.host.all_free

    # -- on the GPU

    def grow(self, round_: int, slots: Ints, tokens: Ints) -> IntArray:
        """Give `slots` [rows] the pages for `tokens` [rows] tokens; as many must be free.

        Returns what that changes in their tables, [n, 3]: slot, index, page.
        """
        missing = self._missing(slots, tokens)
        total = int(missing.sum())
        if not total:
            return np.zeros((0, 3), np.int32)
        swap = self._free_swap[round_]
        from_swap = swap.take(min(total, len(swap)))
        from_main = self._take_main(total - len(from_swap))
        pages = np.concatenate([from_swap, from_main])
        owners, index = spread(slots, self._held[slots], missing)
        self._table = widen(self._table, int(index.max()) + 1)
        self._table[owners, index] = pages
        self._held[slots] += missing
        return np.stack([owners, index, pages], 1).astype(np.int32)

    def _take_main(self, count: int) -> IntArray:
        short = count - len(self._free_main)
        if short > 0:
            self._free_main.give(self.prefixes.evict(short))
        pages = self._free_main.take(count)
        self.readers[pages] = 1
        return pages

    def release(self, round_: int, slot: int) -> None:
        """Take the pages of `slot` back from `round_`; those that somebody else reads stay, and prefix pages."""
        self._release(round_, slot)
        if self.sliding is not None:
            self.sliding.release(slot)

    def _release(self, round_: int, slot: int) -> None:
        pages = main = self.owned(slot)
        if self.swap:
            main = pages[pages < self.main]
            self._free_swap[round_].give(pages[pages >= self.main])
        left = self.readers[main] - 1
        self.readers[main] = left
        unread = main[left == 0]
        if self.shared[slot]:
            kept = self.prefixes.held[unread]
            self.prefixes.give_up(unread[kept])
            unread = unread[~kept]
            self.worst[round_] += self.shared[slot]
        self._free_main.give(unread)
        self._stop_adding(slot)
        self._held[slot] = self.shared[slot] = self.found[slot] = 0

    def movable(self, slot: int) -> bool:
        """Whether `slot` holds main pages alone, which are the same in every round."""
        return bool((self.owned(slot) < self.main).all())

    # -- prefix pages

    def chain(self, request: Request) -> Chain:
        """The pages of the request's prompt that can be prefix pages.

        A request that wants log-probabilities of its prompt reads none: they come from computing it.
        """
        prompt = request.prompt if self._shares else request.prompt[:0]
        root = b"long" if 0 < self._switch < len(prompt) else b""
        return Chain(prompt, self.page_size, reads=request.sampling.prompt_logprobs is None, root=root)

    def find(self, chain: Chain) -> IntArray:
        """The prefix pages behind which the chain's own sequence can begin."""
        found = self.prefixes.find(chain, chain.readable)
        return found if self.sliding is None else found[: self.sliding.readable(chain, len(found))]

    def longest(self, chain: Chain, found: IntArray) -> tuple[int, int]:
        """A page whose copy gives the chain's own sequence more tokens than `found`, and how many more; or 0, 0.

        That takes two main pages besides: one for the copy, and the page itself is kept while the visit is planned.
        """
        if self.sliding is not None or self.free_main - self.unread(found) < 2:
            return 0, 0
        return self.prefixes.longest(chain, len(found))

    def copy(self, page: int, slot: int) -> IntArray:
        """Copy `page` to the first page of `slot` that is no prefix page, before the visit: [1, 2] page, page."""
        return np.array([[page, self._table[slot, self.shared[slot]]]], np.int32)

    def pin(self, page: int) -> None:
        """Keep `page` until the visit has been planned."""
        if not self.readers[page]:
            self.prefixes.take(np.array([page]))
        self.readers[page] += 1
        self._pinned.append(page)

    def planned(self) -> None:
        """The visit has been planned: the next one may copy the pages that it writes."""
        self.prefixes.written()
        for page in self._pinned:
            self.readers[page] -= 1
            if not self.readers[page]:
                self.prefixes.give_up(np.array([page]))
        self._pinned.clear()

    def unread(self, pages: IntArray) -> int:
        """How many of `pages` nobody reads."""
        return int((self.readers[pages] == 0).sum())

    def begin(
        self,
        round_: int,
        slot: int,
        end: int,
        chain: Chain,
        found: IntArray,
        again: int | None,
        copied: tuple[int, int] = (0, 0),
    ) -> IntArray:
        """The sequence in `slot` of `round_`, which owns no page yet, reads the prefix pages `found`, its first ones.

        It has up to `end` computed tokens. Others that wait begin with the first `again` tokens of its `chain`, None:
        nobody knows. It is given main pages for these, as long as there are any, to become prefix pages when they are
        computed (`computes`). The next page is a main page too if it is to be a copy: `copied` as `longest` has it.
        Returns the changes in its table as `grow` does.
        """
        (source, copies), size = copied, self.page_size
        if again is None:
            again = 0
        else:
            self.prefixes.wanted[found] = np.arange(len(found)) * size < again
        if copies:
            self.pin(source)
            self.prefixes.wanted[source] = len(found) * size < again
        # A page that others begin alike is added, unless this very sequence had a copy of as much.
        again = 0 if again <= len(found) * size + copies else min(self.count(again), chain.pages)
        if self.sliding is not None and slot not in self._stashed:  # if it is, it still holds its sliding pages
            self.sliding.begin(slot, end, chain, len(found), again)
        self.prefixes.take(found[self.readers[found] == 0])
        self.readers[found] += 1
        self.shared[slot] = self.found[slot] = len(found)
        self.worst[round_] -= len(found)
        more = min(max(again - len(found), int(copies > 0)), self.free_main)
        assert more >= (copies > 0), "no page for a copy"
        pages = np.concatenate([found, self._take_main(more)])
        self._table = widen(self._table, len(pages))
        self._table[slot, : len(pages)] = pages
        self._held[slot] = len(pages)
        self._add_from(slot, len(found), chain, min(again, len(pages)))
        index = np.arange(len(pages))
        return np.stack([np.full_like(index, slot), index, pages], 1).astype(np.int32)

    def computes(self, round_: int, slot: int, tokens: int) -> None:
        """The visit of `round_` that is being planned computes the prompt in `slot` up to `tokens` tokens."""
        if self.sliding is not None:
            self.sliding.computes(slot, tokens)
        if slot not in self._writing:
            return
        chain, stop = self._writing[slot]
        self._stop_adding(slot)
        first = index = int(self.shared[slot])
        last = min(tokens // self.page_size, stop)
        while index < last and self.prefixes.add(chain, index, int(self._table[slot, index])):
            index += 1
        self.worst[round_] -= index - first
        self.shared[slot] = index
        if index == last:  # otherwise somebody else has computed the same, and goes on
            self._add_from(slot, index, chain, stop)

    def slide(self, slots: IntArray, tokens: Ints, computed: Ints) -> IntArray:
        """The visit that is being planned computes `slots` [rows] up to `tokens` [rows] tokens, draft tokens and all,
        and up to `computed` [rows] for certain.

        Returns what the visit changes in the tables of sliding pages, as `grow` does.
        """
        if self.sliding is None:
            return np.zeros((0, 3), np.int32)
        self.sliding.grow(slots, tokens)
        self.sliding.slide(slots, computed)
        return self.sliding.take_writes()

    def _add_from(self, slot: int, index: int, chain: Chain, stop: int) -> None:
        if index < stop:
            self._writing[slot] = chain, stop
            self.prefixes.expect(chain[index])

    def _stop_adding(self, slot: int) -> None:
        if slot in self._writing:
            chain, _ = self._writing.pop(slot)
            self.prefixes.unexpect(chain[int(self.shared[slot])])

    def forget_prefixes(self) -> None:
        """Forget all prefix pages, of which nobody reads any."""
        self._free_main.give(self.prefixes.forget())
        if self.sliding is not None:
            self.sliding.forget_prefixes()

    # -- in the host pool

    def stash(self, round_: int, slot: int, tokens: int) -> IntArray:
        """Give up the pages of `slot` for host pages that keep its first `tokens` tokens: [n, 2] page, host page.

        Those in prefix pages are not kept: they may be found again. The host pool must have room for the others.
        """
        shared, used = int(self.shared[slot]), self.count(tokens)
        host = self.host.take(max(0, used - shared))
        self._stashed[slot] = shared, host
        pairs = np.stack([self._table[slot, shared:used], host], 1).astype(np.int32)
        self._release(round_, slot)
        return pairs

    def restore(self, slot: int) -> IntArray:
        """Give up the host pages of `slot`, which owns as many pages by now: [n, 2] host page, page. Empty if none."""
        shared, host = self._stashed.pop(slot, (0, np.zeros(0, np.int32)))
        self.host.give(host)
        return np.stack([host, self._table[slot, shared : shared + len(host)]], 1).astype(np.int32)

    def forget(self, slot: int) -> None:
        """Free the host pages of `slot`, whose tokens nobody needs, and its sliding pages."""
        self.host.give(self._stashed.pop(slot, (0, np.zeros(0, np.int32)))[1])
        if self.sliding is not None:
            self.sliding.release(slot)

    def private(self, slot: int, tokens: int) -> int:
        """Pages that hold `tokens` tokens of `slot`, beside the prefix pages that it reads."""
        return max(0, self.count(tokens) - int(self.shared[slot]))  # the last prompt token may be computed again

    def shared_before_stash(self, slot: int) -> int:
        """Prefix pages that come before the host pages of `slot`."""
        return self._stashed[slot][0]

    def stashed(self, slot: int) -> bool:
        """Whether the tokens of `slot` lie in the host pool."""
        return slot in self._stashed

    # -- worst cases

    def expect(self, end: int) -> None:
        """A sequence of up to `end` computed tokens has been admitted."""
        self._largest = max(self._largest, self.count(end))

    def affords(self, round_: int, end: int, read: int) -> bool:
        """Whether `round_` may take a sequence of up to `end` computed tokens, `read` pages of it read by others.

        Should all sequences grow to their end, what does not fit on the GPU must fit in the host pool. They go there
        whole, so room for one more of the largest makes sure that enough of them do.
        """
        if self.sliding is not None and not self.sliding.affords(end):
            return False
        worst = self.worst.copy()
        worst[round_] += self.count(end) - read
        overshoot = self.overshoot(worst)
        return overshoot <= 0 or overshoot + max(self._largest, self.count(end)) <= self.host.free_pages

    def overshoot(self, worst: Ints) -> int:
        """Pages that rounds which need `worst` [rounds] beside the prefix pages in use lack on the GPU."""
        return int(np.maximum(worst - self.swap, 0).sum()) + self.prefixes.read - self.main
