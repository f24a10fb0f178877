"""A small model of the same vocabulary, run on rank 0 between visits, that guesses how sequences go on.

It is a stage of its own that holds all its layers: greedy, with KV pages that no other stage has.
"""

import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from deserve.batch import IntArray, VisitPlan, VisitResult
from deserve.config import ModelSection
from deserve.errors import UserError
from deserve.layout import Layout, Shard
from deserve.model.checkpoint import Checkpoint, check_files, resolve
from deserve.model.tokenizer import ByteTokenizer, Tokenizer, has_tokenizer, load_tokenizer
from deserve.model.weights import parameter_bytes
from deserve.planner.times import Curve
from deserve.scheduler.ids import IdStack
from deserve.scheduler.sequences import Sequences
from deserve.stage import Stage, load_stage

KV_SHARE = 0.1  # of rank 0's memory, that the draft model's pages may take
MEASURED = 3  # visits of each size that are timed, of which the fastest counts


def draft_checkpoint(path: str, main: Checkpoint, tokenizer: Tokenizer | ByteTokenizer | None) -> Checkpoint:
    """The model in the folder `path`, `speculation.model`, to make drafts for `main` with its `tokenizer`.

    Raises UserError unless it is there, whole, and has the same tokens.
    """
    key, folder = f"speculation.model={path}", Path(path).expanduser()
    if not (folder / "config.json").is_file():
        raise UserError(f"{key}: give a folder that holds config.json and *.safetensors")
    checkpoint = resolve(ModelSection(name=folder.resolve().name, path=path))
    check_files(checkpoint)
    if isinstance(tokenizer, Tokenizer) and has_tokenizer(folder):
        other = load_tokenizer(checkpoint)
        if isinstance(other, Tokenizer) and other.vocabulary != tokenizer.vocabulary:
            raise UserError(
                f"{key}: its tokenizer has other tokens than that of {main.name}: only a model of the same "
                "vocabulary can make drafts for it"
            )
    elif checkpoint.config.vocab_size != main.config.vocab_size:
        raise UserError(
            f"{key} has {checkpoint.config.vocab_size} tokens, and {main.name} has "
            f"{main.config.vocab_size}: only a model of the same vocabulary can make drafts for it"
        )
    return checkpoint


@dataclass(frozen=True)
class DraftMemory:
    """What the draft model `checkpoint` takes of rank 0's memory: bytes of its weights and of `pages` KV pages."""

    checkpoint: Checkpoint
    weights: int
    page_bytes: int
    most_pages: int

    @staticmethod
    def within(checkpoint: Checkpoint, memory: int, page_size: int, dtype: torch.dtype) -> "DraftMemory":
        """With `KV_SHARE` of the bytes `memory` for pages. Raises UserError where there is no room."""
        config = checkpoint.config
        weights = parameter_bytes(config, _whole(config.num_layers), dtype)
        page_bytes = page_size * config.kv_spec(dtype, False).token_bytes * config.num_layers
        pages = int(KV_SHARE * memory) // page_bytes
        if weights + pages * page_bytes >= memory or not pages:
            raise UserError(
                f"speculation.model={checkpoint.folder}: its weights take {weights / 1e9:.2f} GB, and rank 0 has "
                f"{memory / 1e9:.2f} GB for both models: use a smaller one"
            )
        return DraftMemory(checkpoint, weights, page_bytes, pages)

    @property
    def bytes(self) -> int:
        return self.weights + self.most_pages * self.page_bytes


@dataclass
class _Cached:
    """What the draft model's KV cache holds of the sequence of that age: `computed` tokens, the last of them drafts."""

    age: int
    computed: int = 0
    length: int = 0  # of the sequence when the drafts were made
    drafts: IntArray = field(default_factory=lambda: np.zeros(0, np.int32))
    pages: list[int] = field(default_factory=list)


class DraftModel:
    """Makes drafts for the sequences of a layout. Those that find no page of its own have none."""

    def __init__(self, memory: DraftMemory, layout: Layout, vocab_size: int, dtype: torch.dtype, device: torch.device):
        self._memory, config = memory, memory.checkpoint.config
        self._most_length, self._vocab = config.max_context, min(vocab_size, config.vocab_size)
        self._page_size, self._budget = layout.page_size, layout.max_batch_tokens
        reach = layout.concurrency * -(-self._most_length // layout.page_size)
        self.pages = pages = min(memory.most_pages, reach)
        own = Layout(
            partition=(0,),
            rounds=1,
            micro_batch_size=layout.micro_batch_size,
            concurrency=layout.concurrency,
            max_batch_tokens=layout.max_batch_tokens,
            policy=layout.policy,
            page_size=layout.page_size,
            main_pages=pages,
            swap_pages=0,
            host_height=0,
        )
        self._stage: Stage = load_stage(memory.checkpoint, own, _whole(config.num_layers), dtype, device)
        self._free = IdStack(np.arange(pages, dtype=np.int32))
        self._cached: dict[int, _Cached] = {}
        self.visit_s = self._measure()

    def __str__(self) -> str:
        checkpoint, pages = self._memory.checkpoint, self.pages
        return (
            f"draft model {checkpoint.name} on rank 0: {self._memory.weights / 1e9:.2f} GB, and "
            f"{pages * self._memory.page_bytes / 1e9:.2f} GB for the KV cache of {pages * self._page_size} tokens; a "
            f"token takes {1000 * self.visit_s(1):.1f} ms"
        )

    @property
    def free_pages(self) -> int:
        """Of its `pages`, those that no sequence has."""
        return len(self._free)

    def seconds(self, rows: int, steps: int) -> float:
        """What `steps` drafts for each of `rows` sequences take, whose text so far is in its KV cache."""
        return steps * self.visit_s(rows)

    def draft(self, sequences: Sequences, slots: IntArray, steps: int) -> IntArray:
        """The likeliest next `steps` tokens of each of `slots` [rows], one after the other: [rows, steps].

        -1 where there is no room for a sequence, and from where the logits are NaN or infinite on.
        """
        drafts = np.full((len(slots), steps), -1, np.int32)
        held: dict[int, _Cached] = {}  # by row
        writes: list[tuple[int, int, int]] = []
        for row, slot in enumerate(slots.tolist()):
            cached = self._followed(sequences, slot)
            end = cached.length + steps - 1
            if end <= self._most_length and self._pages(end) - len(cached.pages) <= len(self._free):
                writes += self._grow(slot, end)
                held[row] = cached
        if not held:
            return drafts
        rows = list(held)
        texts = [
            sequences.chunk(int(slots[row]), cached.computed, cached.length - cached.computed).copy()
            for row, cached in held.items()
        ]
        for step in range(steps):
            context = [cached.computed for cached in held.values()]
            drafts[rows, step] = tokens = self._next(slots[rows], context, texts, writes)
            for cached, text in zip(held.values(), texts, strict=True):
                cached.computed += len(text)
            texts, writes = list(tokens[:, None]), []
        for row, cached in held.items():
            cached.drafts = drafts[row, : steps - 1].copy()
        drafts[((drafts < 0) | (drafts >= self._vocab)).cumsum(1) > 0] = -1
        return drafts

    def forget(self, slot: int) -> None:
        """The sequence in `slot` is complete."""
        cached = self._cached.pop(slot, None)
        if cached is not None:
            self._free.give(np.array(cached.pages, np.int32))

    def _followed(self, sequences: Sequences, slot: int) -> _Cached:
        """What the cache holds of the text of `slot`; drafts in it that were wrong are forgotten."""
        length = int(sequences.length[slot])
        cached = self._cached.get(slot)
        if cached is None or cached.age != sequences.age[slot]:
            self.forget(slot)
            cached = self._cached[slot] = _Cached(int(sequences.age[slot]))
        came = sequences.chunk(slot, cached.length, min(len(cached.drafts), max(0, length - cached.length)))
        right = int((came == cached.drafts[: len(came)]).cumprod().sum())
        # The last token is computed in any case: what follows it is wanted.
        cached.computed = min(cached.computed, cached.length + right, length - 1)
        cached.length, cached.drafts = length, cached.drafts[:0]
        return cached

    def _pages(self, tokens: int) -> int:
        return -(-tokens // self._page_size)

    def _grow(self, slot: int, tokens: int) -> list[tuple[int, int, int]]:
        """Give `slot` pages for so many tokens, if there are any; the writes to its page table."""
        pages = self._cached[slot].pages
        begin = len(pages)
        pages += self._free.take(max(0, self._pages(tokens) - begin)).tolist()
        return [(slot, index, page) for index, page in enumerate(pages[begin:], begin)]

    def _next(
        self, slots: IntArray, context: list[int], texts: list[IntArray], writes: list[tuple[int, int, int]]
    ) -> IntArray:
        """The token after each of `texts`, which follow `context` [rows] tokens of `slots` [rows]: [rows]."""
        begin, missing = np.array(context), np.array([len(text) for text in texts])
        tokens, page_writes = np.zeros(len(slots), np.int32), np.array(writes, np.int32).reshape(-1, 3)
        done = np.zeros_like(missing)
        while (left := missing - done).any():
            counts = np.clip(self._budget - (np.cumsum(left) - left), 0, left)
            rows = np.flatnonzero(counts)
            last = counts[rows] == left[rows]
            ids = [texts[row][done[row] : done[row] + counts[row]] for row in rows.tolist()]
            plan = VisitPlan(
                0,
                slots=slots[rows],
                new_tokens=counts[rows].astype(np.int32),
                context=(begin + done)[rows].astype(np.int32),
                samples=last.astype(np.int32),
                page_writes=page_writes,
            )
            tokens[rows[last]] = self._visit(plan, np.concatenate(ids))
            done += counts
            page_writes = page_writes[:0]
        return tokens

    def _visit(self, plan: VisitPlan, ids: IntArray) -> IntArray:
        # Behind NO_TOKEN and tokens that the main model lacks no draft counts, so any id does.
        words = self._stage.forward(plan, torch.from_numpy(np.clip(ids, 0, self._vocab - 1)))
        self._stage.end_visit(0)
        return VisitResult.decode(words.cpu().numpy(), plan.sampled).tokens

    def _measure(self) -> Curve:
        """Seconds of a visit, by its tokens, all of which are followed by a sample."""
        most = min(self._budget, self._most_length, len(self._free) * self._page_size)
        pages = np.array([(0, index, index) for index in range(self._pages(most))], np.int32)
        points = []
        count = 1
        while count <= most:
            plan = VisitPlan(
                0,
                slots=np.zeros(1, np.int32),
                new_tokens=np.array([count], np.int32),
                context=np.zeros(1, np.int32),
                samples=np.array([count], np.int32),
                drafts=np.zeros(count - 1, np.int32),
                page_writes=pages,
            )
            took = []
            for _ in range(MEASURED):
                begin = time.perf_counter()
                self._visit(plan, np.zeros(count, np.int32))
                took.append(time.perf_counter() - begin)
            points.append((count, min(took)))
            count *= 4
        return Curve.through(points)


def _whole(layers: int) -> Shard:
    return Shard(0, layers, embeds=True, outputs=True)
