"""Prefix pages: main pages full of prompt tokens, which every sequence that begins with these tokens can read.

Every rank executes visits in the order in which they were planned, and a visit writes its keys and values of a layer
before it attends. So a page can be read as soon as the visit that writes its last token has been planned, by rows of
that very visit too.
"""

import heapq
from collections import Counter
from hashlib import blake2b
from itertools import islice

import numpy as np

from deserve.batch import IntArray

LOOK = 64  # pages behind the same prefix, the last to be computed, among which the most alike is looked for


class Chain:
    """The digests of a prompt's full pages, each of the page before it and of its own tokens; made when asked for.

    Chains with different roots have no page in common.
    """

    def __init__(self, prompt: IntArray, page_size: int, reads: bool = True, root: bytes = b""):
        """Unless its sequence `reads`, none of its pages is readable for it."""
        self._words = np.ascontiguousarray(prompt, np.int32)
        self._page_size, self._reads, self._root = page_size, reads, root
        self._digests: list[bytes] = []

    @property
    def pages(self) -> int:
        """Pages that the prompt fills."""
        return len(self._words) // self._page_size

    @property
    def readable(self) -> int:
        """Pages that the prompt's own sequence may read: its last token is always computed, for the logits."""
        return self.readable_tokens // self._page_size

    @property
    def readable_tokens(self) -> int:
        """Tokens whose keys and values the prompt's own sequence may take from others."""
        return max(0, len(self._words) - 1) * self._reads

    def tokens(self, index: int) -> IntArray:
        """The tokens of page `index`, which the prompt need not fill."""
        return self._words[index * self._page_size : (index + 1) * self._page_size]

    def parent(self, index: int) -> bytes:
        """What stands for all before page `index`."""
        return self[index - 1] if index else self._root

    def __getitem__(self, index: int) -> bytes:
        size, digests = self._page_size, self._digests
        for page in range(len(digests), index + 1):
            parent = digests[-1] if digests else self._root
            words = self._words[page * size : (page + 1) * size].tobytes()
            digests.append(blake2b(parent + words, digest_size=16).digest())
        return digests[index]


class Prefixes:
    """Which main page holds which prefix page. A page that nobody reads stays until it is evicted.

    Pages that no request in the window shares go first, then those that were given up first, and of these the ends of
    chains: so a page's parents are held as long as it is.
    """

    def __init__(self, pages: int, page_size: int):
        """`pages`: main pages."""
        self.held = np.zeros(pages, bool)  # whether each main page is a prefix page
        self.wanted = np.zeros(pages, bool)  # by a request in the window, as far as is known
        self.unread = 0  # prefix pages that nobody reads
        self.evicted = 0  # so far
        self._pages: dict[bytes, int] = {}
        self.digests: dict[int, bytes] = {}  # what each prefix page holds
        self._depth = np.zeros(pages, np.int64)
        self._since = np.zeros(pages, np.int64)  # when each page was given up by its last reader; 0: it is read
        self._queue: list[tuple[bool, int, int, int]] = []  # heap of (wanted, since, -depth, page), some out of date
        self._clock = 0
        self._expected: Counter[bytes] = Counter()  # pages that sequences in flight compute next
        self._tokens = np.zeros((pages, page_size), np.int32)  # that each prefix page holds
        self._behind: dict[bytes, dict[int, None]] = {}  # the pages behind each `Chain.parent`, in their order
        self._parent: dict[int, bytes] = {}
        self._unwritten: set[int] = set()  # pages that the visit which is being planned writes

    @property
    def read(self) -> int:
        """Prefix pages that somebody reads."""
        return len(self._pages) - self.unread

    @property
    def spare(self) -> int:
        """Prefix pages that nobody reads or wants."""
        return int(((self._since > 0) & ~self.wanted).sum())

    def find(self, chain: Chain, most: int) -> IntArray:
        """The pages that hold the beginning of `chain`, `most` at most."""
        found: list[int] = []
        while len(found) < most and (page := self.page(chain[len(found)])) is not None:
            found.append(page)
        return np.array(found, np.int32)

    def longest(self, chain: Chain, index: int) -> tuple[int, int]:
        """The page that begins with most of the tokens of page `index` of `chain`, and how many these are; or 0, 0.

        To be copied: earlier visits have written it, and the last prompt token is left to be computed.
        """
        latest = reversed(self._behind.get(chain.parent(index), {}))
        behind = [*islice((page for page in latest if page not in self._unwritten), LOOK)]
        tokens = chain.tokens(index)[: chain.readable_tokens - index * self._tokens.shape[1]]
        if not behind or not len(tokens):
            return 0, 0
        alike = (self._tokens[behind, : len(tokens)] == tokens).cumprod(1).sum(1)
        best = int(alike.argmax())
        return (behind[best], int(alike[best])) if alike[best] else (0, 0)

    def page(self, digest: bytes) -> int | None:
        """The page that holds `digest`, if one does."""
        return self._pages.get(digest)

    def expects(self, chain: Chain, index: int) -> bool:
        """Whether a sequence in flight is about to compute page `index` of `chain`."""
        return bool(self._expected) and index < chain.readable and chain[index] in self._expected

    def expect(self, digest: bytes) -> None:
        """A sequence in flight computes this page next."""
        self._expected[digest] += 1

    def unexpect(self, digest: bytes) -> None:
        """It has, or it will not."""
        self._expected[digest] -= 1
        if not self._expected[digest]:
            del self._expected[digest]

    def add(self, chain: Chain, index: int, page: int) -> bool:
        """`page`, which its writer reads, holds the prefix page `index` of `chain`.

        False if another page does so already.
        """
        digest = chain[index]
        if self._pages.setdefault(digest, page) != page:
            return False
        self.digests[page] = digest
        self._tokens[page] = chain.tokens(index)
        self._parent[page] = chain.parent(index)
        self._behind.setdefault(self._parent[page], {})[page] = None
        self._unwritten.add(page)
        self._depth[page], self._since[page] = index, 0
        self.held[page] = self.wanted[page] = True
        return True

    def written(self) -> None:
        """The visit that writes what was added so far has been planned."""
        self._unwritten.clear()

    def take(self, pages: IntArray) -> None:
        """`pages`, which nobody has read, are read again."""
        self._since[pages] = 0
        self.unread -= len(pages)

    def give_up(self, pages: IntArray) -> None:
        """Nobody reads `pages` any more."""
        self._clock += 1
        self._since[pages] = self._clock
        self.unread += len(pages)
        if len(self._queue) > 2 * len(self.held) + 64:
            self._queue = [entry for entry in self._queue if self._since[entry[3]] == entry[1]]
            heapq.heapify(self._queue)
        fields = (self.wanted[pages], self._depth[pages], pages)
        for wanted, depth, page in zip(*(field.tolist() for field in fields), strict=True):
            heapq.heappush(self._queue, (wanted, self._clock, -depth, page))

    def evict(self, count: int) -> IntArray:
        """Forget `count` pages, of which nobody reads any."""
        pages: list[int] = []
        while len(pages) < count:
            _, since, _, page = heapq.heappop(self._queue)
            if self._since[page] == since:
                self._since[page], self.held[page] = 0, False
                del self._pages[self.digests.pop(page)]
                parent = self._parent.pop(page)
                del self._behind[parent][page]
                if not self._behind[parent]:
                    del self._behind[parent]
                pages.append(page)
        self.unread -= count
        self.evicted += count
        return np.array(pages, np.int32)

    def forget(self) -> IntArray:
        """Forget all pages, of which nobody reads any."""
        evicted = self.evicted
        pages = self.evict(self.unread)
        self.evicted = evicted
        return pages
