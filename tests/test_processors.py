"""Logits processors against transformers' and against the definitions, one row after the other."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    MinNewTokensLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
)

from deserve.batch import DEAD_END, NO_TOKEN, UNDECIDED, Rules
from deserve.model.processors import Processors, likeliest, log_probabilities

VOCAB, CPU = 24, torch.device("cpu")


def logits_of(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 3


def entered(rules: dict[int, Rules], prompt: list[int], output: list[int], slots: int = 8) -> Processors:
    """`rules` by slot, of sequences that all have `prompt` and were then given `output`, token by token."""
    processors = Processors(slots, CPU)
    for slot, of in rules.items():
        processors.admit(slot, of, len(prompt), np.array(prompt, np.int32))
    some = np.array(list(rules), np.int32)
    for nth, token in enumerate(output):
        positions = np.full(len(some), len(prompt) + nth, np.int32)
        processors.record(torch.full((len(some),), token, dtype=torch.int32), some, positions)
    return processors


def applied(rules: Rules, prompt: list[int], output: list[int], logits: torch.Tensor) -> torch.Tensor:
    """Row 0 of `logits` by `rules`, in the company of another row."""
    processors = entered({3: rules, 5: Rules(min_tokens=1)}, prompt, output)
    positions = np.full(2, len(prompt) + len(output), np.int32)
    return processors.apply(logits[:2].clone(), np.array([3, 5], np.int32), positions)[0]


def test_repetition_penalty_is_that_of_transformers() -> None:
    prompt, output, logits = [1, 2, 2, 7], [9, 2, 11], logits_of(2)
    wanted = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([prompt + output]), logits[:1].clone())[0]
    assert torch.equal(applied(Rules(repetition_penalty=1.7), prompt, output, logits), wanted)


def test_frequency_and_presence_count_the_output_alone() -> None:
    prompt, output, logits = [1, 2, 2, 7], [9, 2, 9, 11], logits_of(2)
    wanted = logits[0].clone()
    for token in set(output):
        wanted[token] -= 0.5 * output.count(token) + 0.25
    found = applied(Rules(frequency_penalty=0.5, presence_penalty=0.25), prompt, output, logits)
    torch.testing.assert_close(found, wanted)


def test_banned_words_are_those_of_transformers() -> None:
    banned, logits = ((4,), (9, 2), (2, 9, 5), (9, 3), (9, 7)), logits_of(2)
    for output in ([], [9], [2, 9], [9, 9]):
        context = torch.tensor([[1, 2, *output]])
        wanted = NoBadWordsLogitsProcessor([list(word) for word in banned], eos_token_id=0)(context, logits[:1].clone())
        assert torch.equal(applied(Rules(banned=banned), [1, 2], output, logits), wanted[0])


def test_ends_wait_for_the_minimum_length() -> None:
    logits = logits_of(2)
    processor = MinNewTokensLengthLogitsProcessor(3, min_new_tokens=2, eos_token_id=[0, 6])
    for output in ([], [9], [9, 9]):
        wanted = processor(torch.tensor([[1, 2, 3, *output]]), logits[:1].clone())[0]
        assert torch.equal(applied(Rules(min_tokens=2, ends=(0, 6)), [1, 2, 3], output, logits), wanted)


def test_bias_and_allowed_tokens() -> None:
    logits = logits_of(2)
    found = applied(Rules(bias=((3, -100.0), (4, 2.5)), allowed=(3, 4, 8)), [1], [], logits)
    assert set(torch.isfinite(found).nonzero()[:, 0].tolist()) == {3, 4, 8}
    torch.testing.assert_close(found[[3, 4, 8]], logits[0, [3, 4, 8]] + torch.tensor([-100.0, 2.5, 0.0]))


@given(data=st.data())
@settings(max_examples=100)
def test_a_row_gets_the_same_whatever_its_company(data: st.DataObject) -> None:
    token = st.integers(0, VOCAB - 1)
    rule = st.builds(
        Rules,
        frequency_penalty=st.sampled_from([0.0, 0.7]),
        presence_penalty=st.sampled_from([0.0, -0.3]),
        repetition_penalty=st.sampled_from([1.0, 1.3]),
        bias=st.lists(st.tuples(token, st.sampled_from([-5.0, 4.0])), max_size=3, unique_by=lambda b: b[0]).map(tuple),
        allowed=st.lists(token, max_size=4, unique=True).map(tuple),
        banned=st.lists(st.lists(token, min_size=1, max_size=3).map(tuple), max_size=3).map(tuple),
        min_tokens=st.integers(0, 4),
        ends=st.lists(token, max_size=2, unique=True).map(tuple),
    )
    rules = {slot: data.draw(rule) for slot in (1, 2, 5)}
    prompt = data.draw(st.lists(token, min_size=1, max_size=5))
    output = data.draw(st.lists(token, max_size=5))
    processors = entered(rules, prompt, output)
    slots = np.array([5, 0, 2, 1], np.int32)
    rows = processors.rows(slots)
    assert set(slots[rows].tolist()) == {slot for slot in rules if rules[slot] != Rules()}
    logits = logits_of(len(slots), seed=1)
    position = np.full(len(rows), len(prompt) + len(output), np.int32)
    together = processors.apply(logits[rows].clone(), slots[rows], position) if len(rows) else logits[:0]
    for nth, row in enumerate(rows.tolist()):
        slot = int(slots[row])
        alone = entered({slot: rules[slot]}, prompt, output)
        one = alone.apply(logits[row : row + 1].clone(), slots[row : row + 1], position[:1])
        torch.testing.assert_close(together[nth], one[0])


@pytest.mark.parametrize("none", [NO_TOKEN, DEAD_END, UNDECIDED])
def test_visits_go_on_behind_what_is_no_token(none: int) -> None:
    """As where they are planned ahead. Whoever asks again finds all as it was."""
    rules, logits = {0: Rules(presence_penalty=1.0, repetition_penalty=1.3, banned=((3, 4),))}, logits_of(1)
    processors, slot, nothing = entered(rules, [1, 2], [3]), np.array([0], np.int32), torch.tensor([none])
    before = processors.apply(logits.clone(), slot, np.array([3], np.int32))
    for at in (3, 4):
        processors.record(nothing, slot, np.array([at], np.int32))
        assert processors.apply(logits.clone(), slot, np.array([at + 1], np.int32)).isfinite().any()
    assert torch.equal(processors.apply(logits.clone(), slot, np.array([3], np.int32)), before)


def test_a_slot_keeps_nothing_of_its_last_sequence() -> None:
    processors = entered({2: Rules(frequency_penalty=1.0)}, [1, 2], [3, 3, 3])
    processors.admit(2, Rules(frequency_penalty=1.0), 1, np.array([7], np.int32))
    logits = logits_of(1)
    assert torch.equal(processors.apply(logits.clone(), np.array([2], np.int32), np.array([1], np.int32)), logits)
    processors.admit(2, Rules(), 1, np.array([7], np.int32))
    assert not len(processors.rows(np.array([2], np.int32)))


@pytest.mark.parametrize("top", [0, 1, 5, 9, 10, 20])
def test_the_likeliest_of_many_tokens_are_found_by_blocks(top: int) -> None:
    logits = torch.randn(16, 1280, generator=torch.Generator().manual_seed(top)).bfloat16()  # with equals
    found = likeliest(logits, top)
    assert all(len(row.unique()) == top for row in found)
    assert torch.equal(logits.gather(1, found), logits.topk(top, dim=-1).values)


@pytest.mark.parametrize("top", [0, 1, 5])
def test_log_probabilities(top: int) -> None:
    logits, tokens = logits_of(4).bfloat16(), torch.tensor([3, 0, 23, 9], dtype=torch.int32)
    chosen, ids, values = log_probabilities(logits, tokens, top)
    wanted = logits.double().log_softmax(-1)
    torch.testing.assert_close(chosen.double(), wanted[torch.arange(4), tokens.long()], atol=2e-6, rtol=1e-5)
    best = wanted.topk(top, dim=-1)
    torch.testing.assert_close(values.double(), best.values, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(wanted.gather(1, ids), best.values)
