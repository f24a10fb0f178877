"""The choice of the next token: greedy, or sampled, determined by the request's seed and the token's position."""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from deserve.batch import ADMISSION_WORDS, DEAD_END, MOST_LOGPROBS, NO_TOKEN, UNDECIDED, IntArray, Ints, beside_width
from deserve.model.admissions import Decoder
from deserve.model.grammar import Grammars
from deserve.model.processors import Processors, log_probabilities, ranks
from deserve.staging import to_device

if TYPE_CHECKING:
    from llguidance import LLTokenizer

LIKELIEST = 256  # tokens that are sorted first
SCORED = 64  # prompt tokens whose logits are held at a time
DRAWN_BYTES = 64 << 20  # of logits at a time: sorting and adding them up takes eight times as much

_GOLDEN, _MIX1, _MIX2 = (
    np.uint64(0x9E3779B97F4A7C15),
    np.uint64(0xBF58476D1CE4E5B9),
    np.uint64(0x94D049BB133111EB),
)


def uniforms(seeds: NDArray[np.uint64], positions: IntArray) -> NDArray[np.float32]:
    """One number in [0, 1) for each (seed, position): the SplitMix64 hash of the two.

    Stateless, so a sequence gets the same numbers whatever it is batched with and whenever it is resumed.
    Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
    """
    with np.errstate(over="ignore"):
        z = _splitmix(_splitmix(seeds) ^ positions.astype(np.uint64))
    return ((z >> np.uint64(40)).astype(np.float32)) / np.float32(1 << 24)


def _splitmix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    z = x + _GOLDEN
    z = (z ^ (z >> np.uint64(30))) * _MIX1
    z = (z ^ (z >> np.uint64(27))) * _MIX2
    return z ^ (z >> np.uint64(31))


class Sampler:
    """The last rank's side of sampling: how each slot's sequence wants its tokens."""

    def __init__(self, slots: int, device: torch.device, guide: "Callable[[], LLTokenizer] | None" = None):
        """`guide` gives the tokenizer that grammars need; it is asked when the first one comes."""
        self._device = device
        self._temperature = np.zeros(slots, np.float32)
        self._top_p = np.ones(slots, np.float32)
        self._min_p = np.zeros(slots, np.float32)
        self._top_k = np.zeros(slots, np.int64)
        self._seed = np.zeros(slots, np.uint64)
        self._sorts = np.zeros(slots, bool)  # whether all logits are sorted
        self._logprobs = np.full(slots, -1)  # likeliest tokens wanted beside each, -1: not even its own probability
        self._prompts: dict[int, IntArray] = {}  # by slot, where their log-probabilities are wanted
        self._admissions = Decoder()
        self._processors = Processors(slots, device)
        self._guide = guide
        self._grammars: Grammars | None = None

    def admit(self, admissions: list[IntArray]) -> None:
        """Take note of new sequences, whose words an `admissions.Encoder` made."""
        if not admissions:
            return
        admitted = np.stack([admission[:ADMISSION_WORDS] for admission in admissions])
        slots = admitted[:, 0]
        floats = np.ascontiguousarray(admitted[:, 1:3]).view(np.float32)
        self._temperature[slots], self._top_p[slots] = floats[:, 0], floats[:, 1]
        self._top_k[slots] = admitted[:, 3]
        self._seed[slots] = np.ascontiguousarray(admitted[:, 4:6]).view(np.uint64)[:, 0]
        self._min_p[slots], self._logprobs[slots] = 0, -1
        self._sorts[slots] = self._top_k[slots] >= LIKELIEST
        for slot, admission in zip(slots.tolist(), admissions, strict=True):
            self._admit_extras(slot, admission)

    def _admit_extras(self, slot: int, admission: IntArray) -> None:
        extras = self._admissions.extras(admission)
        self._prompts.pop(slot, None)
        if extras is None:
            self._processors.forget(slot)
            if self._grammars is not None:
                self._grammars.forget(slot)
            return
        self._min_p[slot] = extras.min_p
        self._logprobs[slot] = -1 if extras.logprobs is None else extras.logprobs
        if extras.scored:
            self._prompts[slot] = extras.tokens[: extras.prompt].copy()
        self._processors.admit(slot, extras.rules, extras.prompt, extras.tokens)
        if extras.grammar is not None and self._grammars is None:
            assert self._guide is not None
            self._grammars = Grammars(self._guide(), self._device)
        if self._grammars is not None:
            self._grammars.admit(slot, extras.grammar, extras.tokens[extras.prompt :])

    def sort(self, slots: IntArray) -> None:
        """Sort all logits of the sequences in `slots` [n] from now on: the likeliest have been too few."""
        self._sorts[slots] = True

    def sample(
        self, logits: torch.Tensor, slots: IntArray, positions: IntArray, assumed: IntArray | None = None
    ) -> torch.Tensor:
        """The next token of each row of `logits` [n, vocab], and what is wanted beside it: the words of a VisitResult.

        `positions` [n] is where each token will stand, `assumed` [n] the draft token there on which the next row of
        the same slot goes on, NO_TOKEN where there is none. NO_TOKEN for a row with NaN or infinity in it, DEAD_END for
        one whose own rules leave no token. A logit of minus infinity beside finite ones is allowed: that token has
        probability 0.

        UNDECIDED where top_p or equal logits reach beyond the likeliest tokens. The host cannot know without waiting
        for the device, so it is rank 0 that asks again, after a `sort`.
        """
        greedy = argmax(logits)
        # NaN counts as the largest, so the largest logit alone tells, and the host does not wait for the answer.
        finite = logits.gather(1, greedy[:, None]).squeeze(1).isfinite()
        if assumed is None:
            assumed = np.full(len(slots), NO_TOKEN, np.int32)
        drafted = np.flatnonzero(assumed != NO_TOKEN)
        if len(drafted):
            drafts = to_device(assumed[drafted], self._device)
            self._processors.record(drafts, slots[drafted], positions[drafted])
        ruled, masked = self._processors.rows(slots), self._masked(slots)
        special = np.union1d(ruled, masked)
        free = np.ones(len(slots), bool)
        free[special] = False
        tokens = self._chosen(greedy.to(torch.int32), logits, slots, positions, free)
        if len(special):
            at = to_device(special, self._device)
            x = logits.index_select(0, at).float()
            self._constrain(x, slots[special], positions[special], assumed[special])
            best = argmax(x)
            alive = x.gather(1, best[:, None]).squeeze(1).isfinite()
            chosen = self._chosen(best.to(torch.int32), x, slots[special], positions[special], ~free[special])
            tokens = tokens.index_copy(0, at, chosen.masked_fill(~alive, DEAD_END))
        tokens = tokens.masked_fill(~finite, NO_TOKEN)
        self._processors.record(tokens, slots, positions)
        if len(masked) and self._grammars is not None:
            taken = tokens.index_select(0, to_device(masked, self._device))
            self._grammars.record(taken, slots[masked], assumed[masked])
        return self._with_probabilities(tokens, logits, slots)

    def score(
        self, x: torch.Tensor, logits: Callable[[torch.Tensor], torch.Tensor], slots: IntArray, positions: IntArray
    ) -> torch.Tensor:
        """What is wanted beside the prompt tokens at `positions` [n] of `slots` [n]: int32 [n, SCORE_WIDTH].

        `logits` makes those before each of hidden states x [n, hidden], for a few tokens at a time: a prompt has many.
        """
        own = [self._prompts[slot][at] for slot, at in zip(slots.tolist(), positions.tolist(), strict=True)]
        tokens = to_device(np.array(own), self._device)
        return torch.cat(
            [
                _beside(logits(some), of, MOST_LOGPROBS, ranked=True)
                for some, of in zip(x.split(SCORED), tokens.split(SCORED), strict=True)
            ]
        )

    def _masked(self, slots: IntArray) -> Ints:
        return self._grammars.rows(slots) if self._grammars is not None else np.zeros(0, np.int64)

    def _constrain(self, logits: torch.Tensor, slots: IntArray, positions: IntArray, assumed: IntArray) -> None:
        """Apply the rules and grammars of `slots` [n] to their `logits` [n, vocab], in place."""
        masked = self._masked(slots)
        if len(masked) and self._grammars is not None:
            masks = self._grammars.masks(slots[masked], assumed[masked], logits.shape[1])
            if len(masked) == len(slots):
                self._grammars.apply(logits, masks)
            else:
                at = to_device(masked, self._device)
                logits.index_copy_(0, at, self._grammars.apply(logits.index_select(0, at), masks))
        ruled = self._processors.rows(slots)
        if len(ruled):
            at = to_device(ruled, self._device)
            x = self._processors.apply(logits.index_select(0, at), slots[ruled], positions[ruled])
            logits.index_copy_(0, at, x)

    def _chosen(
        self,
        tokens: torch.Tensor,
        logits: torch.Tensor,
        slots: IntArray,
        positions: IntArray,
        among: NDArray[np.bool_],
    ) -> torch.Tensor:
        """`tokens` [n], with those of rows `among` that are not greedy drawn from `logits` [n, vocab] instead."""
        chance = among & (self._temperature[slots] > 0)
        cut = (self._top_k[slots] > 0) | (self._top_p[slots] < 1)
        whole = self._sorts[slots]
        few = partial(draw, likeliest=LIKELIEST)
        ways = (chance & ~cut, draw_uncut), (chance & cut & whole, draw), (chance & cut & ~whole, few)
        for asked, choose in ways:
            rows = np.flatnonzero(asked)
            if len(rows):
                tokens = self._drawn(tokens, logits, slots, positions, rows, choose)
        return tokens

    def _drawn(
        self,
        tokens: torch.Tensor,
        logits: torch.Tensor,
        slots: IntArray,
        positions: IntArray,
        rows: Ints,
        choose: Callable[..., torch.Tensor],
    ) -> torch.Tensor:
        slots, positions = slots[rows], positions[rows]
        settings: list[NDArray[Any]] = [self._temperature[slots], self._min_p[slots]]
        if choose is not draw_uncut:
            settings += [self._top_p[slots], self._top_k[slots]]
        at, uniform, *values = (
            to_device(v, self._device) for v in (rows, uniforms(self._seed[slots], positions), *settings)
        )
        few = max(1, DRAWN_BYTES // (4 * logits.shape[1]))
        drawn = [
            choose(logits.index_select(0, some).float(), *its)
            for some, *its in zip(*(value.split(few) for value in (at, uniform, *values)), strict=True)
        ]
        return tokens.index_copy(0, at, torch.cat(drawn).to(torch.int32))

    def _with_probabilities(self, tokens: torch.Tensor, logits: torch.Tensor, slots: IntArray) -> torch.Tensor:
        """`tokens` [n], and beside them the log-probabilities of the rows that want them."""
        wanted = np.flatnonzero(self._logprobs[slots] >= 0)
        if not len(wanted):
            return tokens
        top, at = int(self._logprobs[slots].max()), to_device(wanted, self._device)
        chosen = tokens.index_select(0, at).clamp(min=0)
        beside = tokens.new_zeros(len(tokens), beside_width(top))
        beside.index_copy_(0, at, _beside(logits.index_select(0, at), chosen, top))
        return torch.cat([tokens, beside.view(-1)])


def _beside(logits: torch.Tensor, tokens: torch.Tensor, top: int, ranked: bool = False) -> torch.Tensor:
    """The words that stand beside `tokens` [n] by their `logits` [n, vocab], with the token's rank last if `ranked`."""
    own, ids, best = log_probabilities(logits, tokens, top)
    parts = [own[:, None].view(torch.int32), ids.to(torch.int32), best.contiguous().view(torch.int32)]
    if ranked:
        parts.append(ranks(logits, tokens)[:, None].to(torch.int32))
    return torch.cat(parts, 1)


def argmax(logits: torch.Tensor, block: int = 256) -> torch.Tensor:
    """The first largest entry of each row of `logits` [n, vocab]: [n].

    First the best block, then the best within it: eight times faster than `torch.argmax` for bfloat16 on a CPU.
    """
    n, vocab = logits.shape
    if logits.is_cuda or vocab % block or not n:
        return logits.argmax(-1)
    blocks = logits.view(n, -1, block)
    best = blocks.amax(-1).argmax(-1)
    return best * block + blocks[torch.arange(n), best].argmax(-1)


def draw_uncut(
    logits: torch.Tensor, uniform: torch.Tensor, temperature: torch.Tensor, min_p: torch.Tensor
) -> torch.Tensor:
    """Sample each row of `logits` [n, vocab] at its `temperature` [n] from the tokens that are at least `min_p` [n]
    times as likely as the likeliest; `uniform` [n] decides. Returns [n]. Needs no sorting."""
    kept = _likely(logits / temperature[:, None], min_p).softmax(-1).cumsum(-1)
    choice = torch.searchsorted(kept, uniform[:, None] * kept[:, -1:], right=True)
    # Rounding may leave a draw at the very end, where the last tokens have probability 0: the last that has one is it.
    return torch.minimum(choice, (kept < kept[:, -1:]).sum(-1, keepdim=True)).squeeze(1)


def _likely(scaled: torch.Tensor, min_p: torch.Tensor) -> torch.Tensor:
    """`scaled` [n, vocab] logits, minus infinity where a token is less than `min_p` [n] times as likely as the best."""
    return scaled.masked_fill(scaled < scaled.amax(-1, keepdim=True) + min_p[:, None].log(), -torch.inf)


def draw(
    logits: torch.Tensor,
    uniform: torch.Tensor,
    temperature: torch.Tensor,
    min_p: torch.Tensor,
    top_p: torch.Tensor,
    top_k: torch.Tensor,
    likeliest: int | None = None,
) -> torch.Tensor:
    """The same cut to the `top_k` [n] most likely tokens (0: all), then to the fewest of them that hold `top_p` [n] of
    the probability. The most likely token is always kept.

    With `likeliest` only so many of the likeliest are sorted; UNDECIDED where these are too few.
    """
    scaled = _likely(logits / temperature[:, None], min_p)
    if likeliest is None or likeliest >= scaled.shape[1]:
        tokens = scaled.sort(dim=-1, descending=True, stable=True).indices
        return _drawn(scaled.softmax(-1).gather(1, tokens), tokens, uniform, top_p, top_k)[0]
    # Among equals topk takes and gives any: those with the lowest ids come first, as in a stable sort.
    tokens = scaled.topk(likeliest, dim=-1).indices.sort(dim=-1).values
    values, order = scaled.gather(1, tokens).sort(dim=-1, descending=True, stable=True)
    tokens = tokens.gather(1, order)
    drawn, kept = _drawn(scaled.softmax(-1).gather(1, tokens), tokens, uniform, top_p, top_k)
    # What equals the last may stand for others; nothing is beyond a last one that is ruled out.
    last = values[:, -1:]
    decided = (values.gather(1, kept[:, None] - 1) > last) | last.isneginf()
    return drawn.where(decided.squeeze(1), UNDECIDED)


def _drawn(
    probabilities: torch.Tensor,
    tokens: torch.Tensor,
    uniform: torch.Tensor,
    top_p: torch.Tensor,
    top_k: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The token drawn from the first of `tokens` [n, m], in falling order of their `probabilities` [n, m], that `top_k`
    and `top_p` [n] keep, and how many these are: [n] both."""
    rank = torch.arange(tokens.shape[1], device=tokens.device)
    limited = top_k[:, None] > 0
    upto = probabilities.cumsum(-1)
    before = F.pad(upto[:, :-1], (1, 0))
    held = torch.where(limited, upto.gather(1, top_k[:, None].clamp(1, tokens.shape[1]) - 1), 1.0)
    # A full top_p keeps everything: rounding in the sum must not cut off the tail.
    beyond = (limited & (rank >= top_k[:, None])) | ((before >= top_p[:, None] * held) & (top_p[:, None] < 1))
    beyond[:, 0] = False
    kept = probabilities.masked_fill(beyond, 0.0).cumsum(-1)
    choice = torch.searchsorted(kept, uniform[:, None] * kept[:, -1:], right=True)
    last = (kept < kept[:, -1:]).sum(-1, keepdim=True)
    return tokens.gather(1, torch.minimum(choice, last)).squeeze(1), (~beyond).sum(-1)
