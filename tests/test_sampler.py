"""Sampling against distributions worked out in numpy."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from deserve.batch import DEAD_END, NO_TOKEN, UNDECIDED, Rules, SamplingParams, VisitResult, beside_width
from deserve.model.admissions import Encoder, encode_sampling
from deserve.model.sampler import LIKELIEST, Sampler, argmax, draw, draw_uncut, uniforms

VOCAB = 50
DRAWS = 40_000


def distribution(logits: np.ndarray, temperature: float, top_p: float, top_k: int, min_p: float = 0) -> np.ndarray:
    """The probabilities [vocab] that the parameters ask for, one token after the other."""
    scaled = logits.astype(np.float64) / temperature
    scaled = np.where(np.exp(scaled - scaled.max()) < min_p, -np.inf, scaled)
    order = np.argsort(-scaled, kind="stable")
    kept = order[:top_k] if top_k else order
    probabilities = np.exp(scaled[kept] - scaled[kept].max())
    probabilities /= probabilities.sum()
    if top_p < 1:
        count = int(np.searchsorted(np.cumsum(probabilities), top_p)) + 1  # the fewest that hold top_p
        kept, probabilities = kept[:count], probabilities[:count]
    result = np.zeros(len(logits))
    result[kept] = probabilities / probabilities.sum()
    return result


def drawn(
    logits: np.ndarray, temperature: float, top_p: float, top_k: int, uniform: np.ndarray, min_p: float = 0.0
) -> np.ndarray:
    n = len(uniform)
    rows = torch.from_numpy(logits).expand(n, -1)
    of_all = [torch.from_numpy(uniform), torch.full((n,), temperature), torch.full((n,), min_p)]
    if top_p == 1 and not top_k:
        return draw_uncut(rows, *of_all).numpy()
    return draw(rows, *of_all, torch.full((n,), top_p), torch.full((n,), top_k)).numpy()


@pytest.mark.parametrize(
    ("temperature", "top_p", "top_k", "min_p"),
    [
        (1.0, 1.0, 0, 0.0),
        (0.3, 1.0, 0, 0.0),
        (2.5, 1.0, 0, 0.0),
        (2.5, 1.0, 0, 0.2),
        (1.0, 0.5, 0, 0.0),
        (1.0, 1.0, 5, 0.0),
        (1.5, 0.8, 10, 0.0),
        (1.5, 0.9, 10, 0.3),
        (1.0, 1e-6, 0, 0.0),
        (1.0, 1.0, 1, 0.0),
        (1.0, 1.0, 0, 1.0),
    ],
)
def test_draws_follow_the_distribution(temperature: float, top_p: float, top_k: int, min_p: float) -> None:
    logits = np.random.default_rng(1).normal(0, 2, VOCAB).astype(np.float32)
    uniform = ((np.arange(DRAWS) + 0.5) / DRAWS).astype(np.float32)  # evenly spread, so the counts are nearly exact
    found = np.bincount(drawn(logits, temperature, top_p, top_k, uniform, min_p), minlength=VOCAB) / DRAWS
    wanted = distribution(logits, temperature, top_p, top_k, min_p)
    assert np.abs(found - wanted).max() < 2 / DRAWS
    assert set(np.flatnonzero(found)) <= set(np.flatnonzero(wanted))


def test_rows_have_their_own_parameters() -> None:
    random = np.random.default_rng(2)
    logits = random.normal(0, 2, (30, VOCAB)).astype(np.float32)
    temperature = random.uniform(0.2, 2, 30).astype(np.float32)
    top_p = random.uniform(0.1, 1, 30).astype(np.float32)
    top_k = random.integers(0, 12, 30)
    uniform = random.uniform(size=30).astype(np.float32)
    min_p = np.zeros(30, np.float32)
    together = draw(*map(torch.from_numpy, (logits, uniform, temperature, min_p, top_p, top_k))).tolist()
    for row, token in enumerate(together):
        alone = drawn(logits[row], temperature[row].item(), top_p[row].item(), int(top_k[row]), uniform[row : row + 1])
        assert token == alone[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [250, 3000])
def test_the_likeliest_tokens_decide_as_all_of_them_do(vocab: int, dtype: torch.dtype) -> None:
    """Or they do not decide: where the nucleus or equals of its last token reach beyond them."""
    random = torch.Generator().manual_seed(vocab)
    n = 600
    logits = (4 * torch.randn(n, vocab, generator=random)).to(dtype).float()  # in bfloat16 many are equal
    logits[:50] = logits[:50].round()
    logits[50:60, 100:] = -torch.inf
    logits[60] = 0.0
    settings = [torch.rand(n, generator=random) for _ in range(4)]
    uniform, temperature, min_p, top_p = settings[0], 0.05 + 2 * settings[1], 0.1 * settings[2], 0.01 + settings[3]
    min_p[::2], top_p[::3], top_p[1::3] = 0.0, 1.0, top_p[1::3].clamp(max=0.99)
    top_k = torch.randint(0, LIKELIEST + 1, (n,), generator=random)
    top_k[1::3] = 0
    top_p = top_p.clamp(max=1.0)
    whole = draw(logits, uniform, temperature, min_p, top_p, top_k)
    few = draw(logits, uniform, temperature, min_p, top_p, top_k, LIKELIEST)
    decided = few != UNDECIDED
    assert torch.equal(few[decided], whole[decided])
    assert decided.all() if vocab <= LIKELIEST else 300 < decided.sum() < n
    assert decided[50:60].all()
    assert decided[60] == (vocab <= LIKELIEST)


def test_rows_that_are_not_decided_are_sorted_when_asked_again() -> None:
    logits = torch.zeros(3, 1000)
    logits[1, 7] = 20.0
    sampler, slots = Sampler(3, torch.device("cpu")), np.arange(3, dtype=np.int32)
    sampling = SamplingParams(temperature=1.0, top_p=0.9)
    sampler.admit([encode_sampling(slot, replace(sampling, top_k=300 * (slot == 2))) for slot in range(3)])
    first = sampler.sample(logits, slots, slots)
    assert first[0] == UNDECIDED and first[1] == 7 and first[2] >= 0  # top_k says that more than the likeliest count
    sampler.sort(slots[:1])
    again = sampler.sample(logits, slots, slots)
    assert 0 <= again[0] < 900 and torch.equal(again[1:], first[1:])
    sampler.admit([encode_sampling(0, sampling)])
    assert sampler.sample(logits, slots, slots)[0] == UNDECIDED


def test_top_k_of_equals_keeps_k() -> None:
    uniform = np.linspace(0, 0.999, 1000, dtype=np.float32)
    assert set(drawn(np.zeros(VOCAB, np.float32), 1.0, 1.0, 3, uniform)) == {0, 1, 2}


@pytest.mark.parametrize("vocab", [320, 512, 1024, 49152])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_argmax_takes_the_first_of_equals(vocab: int, dtype: torch.dtype) -> None:
    logits = torch.randn(64, vocab, generator=torch.Generator().manual_seed(0)).to(dtype)
    logits[0] = 1.0
    logits[1, [300, 17, 250]] = 100.0
    found = argmax(logits).tolist()
    assert found[0] == 0 and found[1] == 17
    assert found == [int(np.argmax(row)) for row in logits.float().numpy()]


def test_uniforms_are_stateless_and_even() -> None:
    seeds, positions = np.meshgrid(np.arange(100, dtype=np.uint64), np.arange(1000, dtype=np.int32), indexing="ij")
    values = uniforms(seeds.ravel(), positions.ravel())
    assert values.dtype == np.float32 and values.min() >= 0 and values.max() < 1
    shuffled = np.random.default_rng(0).permutation(values.size)
    assert np.array_equal(uniforms(seeds.ravel()[shuffled], positions.ravel()[shuffled]), values[shuffled])
    counts, _ = np.histogram(values, bins=50, range=(0, 1))
    assert np.abs(counts / values.size - 0.02).max() < 0.002
    assert len(np.unique(values)) > 0.99 * values.size
    table = values.reshape(seeds.shape)
    assert abs(np.corrcoef(table[:-1].ravel(), table[1:].ravel())[0, 1]) < 0.02  # neighbouring seeds
    assert abs(np.corrcoef(table[:, :-1].ravel(), table[:, 1:].ravel())[0, 1]) < 0.02  # neighbouring positions


def test_what_a_row_gets_does_not_depend_on_its_company() -> None:
    """Parameters travel through a plan's words, negative and large seeds too, and greedy rows stay greedy."""
    random = np.random.default_rng(3)
    wanted = [
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=0.7, top_p=0.9, seed=2**63 - 1),
        SamplingParams(temperature=1.3, top_k=4, seed=5),
        SamplingParams(temperature=1.3, seed=2**40),
        SamplingParams(temperature=1.3, min_p=0.2, seed=4, logprobs=2),
        SamplingParams(rules=Rules(bias=((17, 50.0),)), logprobs=0),
        SamplingParams(rules=Rules(allowed=(3, 9), banned=((3,), (9,)))),
        SamplingParams(temperature=1.3, rules=Rules(repetition_penalty=1.5, frequency_penalty=2.0), seed=8),
    ]
    count = len(wanted)
    logits = torch.from_numpy(random.normal(0, 2, (count, 512)).astype(np.float32))
    slots, positions = random.permutation(12)[:count].astype(np.int32), np.full(count, 5, np.int32)
    prompts = random.integers(0, 512, (count, 5)).astype(np.int32)

    def admitted(rows: list[int], encoder: Encoder) -> Sampler:
        sampler = Sampler(12, torch.device("cpu"))
        sampler.admit([encoder.words(int(slots[row]), wanted[row], 5, prompts[row]) for row in rows])
        return sampler

    result = admitted([*range(count)], Encoder(()))
    together = VisitResult.decode(result.sample(logits, slots, positions).numpy(), count)
    assert together.tokens[0] == int(logits[0].argmax())
    assert together.tokens[5] == 17 and together.tokens[6] == DEAD_END
    probabilities = logits[4].log_softmax(-1)
    own, *rest = together.beside[4].tolist()
    torch.testing.assert_close(np.array(own, np.int32).view(np.float32), probabilities[together.tokens[4]].numpy())
    assert rest[:2] == logits[4].topk(2).indices.tolist()
    for row in range(count):
        alone, one = admitted([row], Encoder(())), slice(row, row + 1)
        found = VisitResult.decode(alone.sample(logits[one], slots[one], positions[one]).numpy(), 1)
        assert found.tokens[0] == together.tokens[row]
        assert found.beside.shape[1] == beside_width(wanted[row].logprobs)
        # A slot that is given to the next sequence keeps nothing of the last.
        alone.admit([encode_sampling(int(slots[row]), SamplingParams())])
        assert alone.sample(logits[one], slots[one], positions[one]).tolist() == [int(logits[row].argmax())]


def test_many_rows_are_drawn_as_few_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deserve.model.sampler.DRAWN_BYTES", 4 * 64 * 50)
    rows = 133
    logits = torch.randn(rows, 64, generator=torch.Generator().manual_seed(0))
    slots = np.random.default_rng(0).permutation(rows).astype(np.int32)
    sampler = Sampler(rows, torch.device("cpu"))
    some = [
        SamplingParams(temperature=float(slot % 3 > 0), top_p=0.9, top_k=slot % 7, seed=slot) for slot in range(rows)
    ]
    sampler.admit([encode_sampling(slot, sampling) for slot, sampling in enumerate(some)])
    together = sampler.sample(logits, slots, slots)
    parts = [slice(begin, begin + 10) for begin in range(0, rows, 10)]
    apart = torch.cat([sampler.sample(logits[part], slots[part], slots[part]) for part in parts])
    assert together.dtype == torch.int32 and torch.equal(together, apart)
    assert not torch.equal(together, logits.argmax(-1).int())


@pytest.mark.parametrize("vocab", [320, 512])  # where argmax goes by blocks, and where it does not
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_rows_without_finite_logits_give_no_token(vocab: int, dtype: torch.dtype, temperature: float) -> None:
    """Wherever NaN or infinity stands in a row; the other rows get what they get without such company."""
    logits = torch.randn(6, vocab, generator=torch.Generator().manual_seed(0)).to(dtype)
    sampler = Sampler(6, torch.device("cpu"))
    slots = np.arange(6, dtype=np.int32)
    sampling = SamplingParams(temperature=temperature)
    sampler.admit([encode_sampling(slot, sampling) for slot in range(6)])
    wanted = sampler.sample(logits, slots, slots)
    bad = logits.clone()
    bad[1, vocab - 1] = torch.nan
    bad[2, 0] = torch.inf
    bad[3] = -torch.inf
    bad[4] = torch.nan
    bad[5, (int(wanted[5]) + 1) % vocab] = -torch.inf  # a token of probability 0, not an error
    found = sampler.sample(bad, slots, slots)
    assert found[1:5].tolist() == [NO_TOKEN] * 4 and found[0] == wanted[0]
    assert found[5] >= 0 and (temperature or found[5] == wanted[5])
