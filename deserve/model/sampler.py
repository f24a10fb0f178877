"""The choice of the next token: greedy, or by chance that only the request's seed and the position decide."""

import numpy as np
import torch
from numpy.typing import NDArray

from deserve.batch import ADMISSION_WORDS, NO_TOKEN, IntArray, SamplingParams
from deserve.staging import to_device

DRAWN_BYTES = 64 << 20  # of logits at a time: sorting and adding them up takes eight times as much

_GOLDEN, _MIX1, _MIX2 = (
    np.uint64(0x9E3779B97F4A7C15),
    np.uint64(0xBF58476D1CE4E5B9),
    np.uint64(0x94D049BB133111EB),
)


def encode_sampling(slot: int, sampling: SamplingParams) -> IntArray:
    """`sampling` as the words of an admission: slot, temperature and top_p (float bits), top_k, seed (low, high)."""
    bits = np.array([sampling.temperature, sampling.top_p], np.float32).view(np.int32).tolist()
    seed = np.array([sampling.seed], np.int64).view(np.int32).tolist()
    return np.array([slot, *bits, min(sampling.top_k, 2**31 - 1), *seed], np.int32)


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

    def __init__(self, slots: int, device: torch.device):
        self._device = device
        self._temperature = np.zeros(slots, np.float32)
        self._top_p = np.ones(slots, np.float32)
        self._top_k = np.zeros(slots, np.int64)
        self._seed = np.zeros(slots, np.uint64)

    def admit(self, admissions: list[IntArray]) -> None:
        """Take note of new sequences, whose first words `encode_sampling` made."""
        if not admissions:
            return
        admitted = np.stack([admission[:ADMISSION_WORDS] for admission in admissions])
        slots = admitted[:, 0]
        floats = np.ascontiguousarray(admitted[:, 1:3]).view(np.float32)
        self._temperature[slots], self._top_p[slots] = floats[:, 0], floats[:, 1]
        self._top_k[slots] = admitted[:, 3]
        self._seed[slots] = np.ascontiguousarray(admitted[:, 4:6]).view(np.uint64)[:, 0]

    def sample(self, logits: torch.Tensor, slots: IntArray, positions: IntArray) -> torch.Tensor:
        """The next token of each row of `logits` [n, vocab]: int32 [n]. `positions` [n] is where each will stand.

        NO_TOKEN for a row with NaN or infinity in it. A logit of minus infinity beside finite ones is allowed: that
        token has probability 0.
        """
        greedy = argmax(logits)
        # NaN counts as the largest, so the largest logit alone tells, and the host does not wait for the answer.
        finite = logits.gather(1, greedy[:, None]).squeeze(1).isfinite()
        greedy = greedy.to(torch.int32)
        chance = np.flatnonzero(self._temperature[slots] > 0)
        if len(chance):
            greedy = self._drawn(greedy, logits, slots, positions, chance)
        return greedy.masked_fill(~finite, NO_TOKEN)

    def _drawn(
        self, greedy: torch.Tensor, logits: torch.Tensor, slots: IntArray, positions: IntArray, chance: NDArray[np.intp]
    ) -> torch.Tensor:
        """`greedy` [n] with the rows `chance` drawn instead."""
        slots, positions = slots[chance], positions[chance]
        settings = (self._temperature[slots], self._top_p[slots], self._top_k[slots])
        values = [to_device(v, self._device) for v in (*settings, uniforms(self._seed[slots], positions))]
        rows = to_device(chance, self._device)
        few = max(1, DRAWN_BYTES // (4 * logits.shape[1]))
        drawn = [
            draw(logits.index_select(0, some).float(), *its)
            for some, *its in zip(*(value.split(few) for value in (rows, *values)), strict=True)
        ]
        return greedy.index_copy(0, rows, torch.cat(drawn).to(torch.int32))


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


def draw(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_p: torch.Tensor,
    top_k: torch.Tensor,
    uniform: torch.Tensor,
) -> torch.Tensor:
    """Sample each row of `logits` [n, vocab] at its `temperature` [n], cut to its `top_k` most likely tokens
    (0: all), then to the fewest of them that hold `top_p` of the probability; `uniform` [n] decides. Returns [n].

    The most likely token is always kept.
    """
    values, tokens = (logits / temperature[:, None]).sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(values.shape[1], device=values.device)
    beyond_k = (top_k[:, None] > 0) & (rank >= top_k[:, None])
    probabilities = values.masked_fill(beyond_k, -torch.inf).softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    # A full top_p keeps everything: rounding in the sum must not cut off the tail.
    beyond_p = (before >= top_p[:, None]) & (top_p[:, None] < 1) & (rank > 0)
    kept = probabilities.masked_fill(beyond_p, 0.0).cumsum(-1)
    choice = torch.searchsorted(kept, uniform[:, None] * kept[:, -1:], right=True).clamp_(max=values.shape[1] - 1)
    return tokens.gather(1, choice).squeeze(1)
