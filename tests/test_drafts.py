"""Draft tokens: found where the same tokens stood before, as many as are worth it, counted when they are verified."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from deserve.batch import IntArray, Request, SamplingParams
from deserve.model.grammar import checked_grammar
from deserve.model.tokenizer import ByteTokenizer
from deserve.report.summary import speculation
from deserve.scheduler.drafts import COMPARED, LEAD, MOST, Drafts
from deserve.scheduler.forced import Forced
from deserve.scheduler.sequences import Sequences, never

EOS = 7


def add(sequences: Sequences, prompt: list[int], answer: list[int], room: int = 100) -> int:
    """A sequence that has got as far as `answer`."""
    limit = SamplingParams(max_tokens=len(answer) + room)
    slot = sequences.add(Request("", np.array(prompt, np.int32), limit))
    grow(sequences, slot, answer)
    return slot


def grow(sequences: Sequences, slot: int, tokens: list[int]) -> None:
    for token in tokens:
        sequences.append(np.array([slot], np.int32), np.ones(1, np.int32), np.array([token], np.int32))


def proposed(drafts: Drafts, sequences: Sequences, slot: int, most: int = MOST) -> list[int]:
    """The draft tokens that the sequence in `slot` gets."""
    slots = np.array([slot], np.int32)
    counts = drafts.propose(sequences, slots, np.array([most]), 1000, 1, 0)
    return sequences.ids(slots, sequences.length[slots], counts.astype(np.int32)).tolist()


def test_what_followed_in_the_own_text() -> None:
    sequences, drafts = Sequences(4, (EOS,), never), Drafts(4, fixed=5)
    slot = add(sequences, [10, 11, 12, 13, 14, 15, 16, 17, 18, 19], [50, 12, 13, 14])
    assert proposed(drafts, sequences, slot) == [15, 16, 17, 18, 19]
    assert proposed(drafts, sequences, slot, most=2) == [15, 16]
    grow(sequences, slot, [15, 60])
    assert proposed(drafts, sequences, slot) == []
    report = drafts.report()
    # Of the last proposal the first draft was right, the second was not.
    assert report["by_source"] == {"own_text": {"drafted": 2, "right": 1}} and report["tokens_per_trip"] == 4 / 3
    drafts.passed(3)
    assert drafts.report()["tokens_per_trip"] == 7 / 6


def test_what_followed_in_other_answers_and_not_in_other_prompts() -> None:
    sequences, drafts = Sequences(4, (EOS,), never), Drafts(4, fixed=4)
    first = add(sequences, [1, 2, 3], [20, 21, 22, 23, 24, 25, EOS])
    second = add(sequences, [5, 4, 3, 20, 21, 22, 23], [40, 41])
    third = add(sequences, [9, 40, 41, 9], [42, 20, 21, 22])
    assert proposed(drafts, sequences, third) == []
    drafts.ends(sequences, first)
    sequences.remove(first)
    assert proposed(drafts, sequences, third) == [23, 24, 25]  # to the end of that answer
    again = add(sequences, [8, 1, 2, 3], [])  # an answer may begin as another did that followed the same words
    assert proposed(drafts, sequences, again) == [20, 21, 22, 23]
    # An answer under way serves too, once the drafts for its own sequence have made its text known.
    assert proposed(drafts, sequences, second) == []
    fourth = add(sequences, [6, 21, 22, 23], [40])
    assert proposed(drafts, sequences, fourth) == [41]


def test_a_slot_that_others_had_says_nothing_of_them() -> None:
    sequences, drafts = Sequences(1, (EOS,), never), Drafts(1, fixed=4)
    slot = add(sequences, [1, 2, 3, 4, 5, 1, 2, 3], [])
    assert proposed(drafts, sequences, slot) == [4, 5, 1, 2]
    sequences.remove(slot)
    slot = add(sequences, [9, 1, 2, 3], [])
    assert proposed(drafts, sequences, slot) == []


def test_the_store_of_answers_starts_over_when_it_is_full(monkeypatch) -> None:
    monkeypatch.setattr("deserve.scheduler.drafts.TEXT", 64)
    sequences, drafts = Sequences(2, (EOS,), never), Drafts(2, fixed=3)
    for begin in range(100, 2000, 100):
        slot = add(sequences, [begin], list(range(begin + 1, begin + 12)))
        drafts.ends(sequences, slot)
        sequences.remove(slot)
    slot = add(sequences, [1], [1905, 1906, 1907])
    assert proposed(drafts, sequences, slot) == [1908, 1909, 1910]
    grow(sequences, slot, [105, 106, 107])
    assert proposed(drafts, sequences, slot) == []


def test_as_many_as_are_worth_it() -> None:
    """None where a token costs as much as it brings at best; all where it costs nothing; some between."""

    def cycle(each: float):
        return lambda rounds, sequences, prompts=0, drafts=0, drafting_s=0.0: 1.0 + each * drafts

    text = list(range(100, 140))
    counts = []
    for each in (1.0, 0.3, 0.0):
        sequences, drafts = Sequences(2, (EOS,), never), Drafts(2, cycle(each))
        slot = add(sequences, text, text[5 : 5 + COMPARED])
        counts.append(len(proposed(drafts, sequences, slot)))
    assert counts[0] == 0 < counts[1] < counts[2] == MOST


def test_in_the_tail_drafts_of_few_rows_must_not_keep_the_others() -> None:
    """One of four rows finds drafts, at a cost for all: worth it while others wait, not when the last row sets the
    time."""
    text, counts = list(range(100, 140)), []
    for tail in (False, True):
        sequences = Sequences(4, (EOS,), never)
        drafts = Drafts(4, lambda rounds, sequences, prompts=0, drafts=0, drafting_s=0.0: 1.0 + 0.1 * drafts)
        rows = [add(sequences, text, text[5 : 5 + COMPARED]), *(add(sequences, [1], [nth]) for nth in range(2, 5))]
        most = np.full(4, MOST)
        counts.append(drafts.propose(sequences, np.array(rows, np.int32), most, 1000, 1, 0, tail).tolist())
    assert counts[0][0] > 3 and counts[0][1:] == [0, 0, 0] and counts[1] == [0, 0, 0, 0]


def test_drafts_that_are_always_wrong_are_given_up_and_right_ones_kept() -> None:
    """Right ones are found to be so where none was verified at first: after two tokens half of the drafts are right,
    as a new job has it."""

    def drafted(text: list[int], each: float = 0.2) -> list[int]:
        """How many drafts each visit of a sequence has whose answer is `text`."""
        sequences = Sequences(1, (EOS,), never)
        drafts = Drafts(1, lambda rounds, sequences, prompts=0, drafts=0, drafting_s=0.0: 1.0 + each * drafts)
        slot, counts = add(sequences, [1], [], room=len(text) + MOST), []
        while len(output := sequences.output(slot)) < len(text) - MOST:
            tokens = proposed(drafts, sequences, slot)
            assert len(tokens) < 2 or tokens[0] in text
            counts.append(len(tokens))
            sampled = np.array(text[len(output) : len(output) + len(tokens) + 1], np.int32)
            sequences.append(np.array([slot], np.int32), np.array([len(tokens) + 1], np.int32), sampled)
        return counts

    wrong = drafted([token for nth in range(100) for token in (100, 101, 1000 + nth)], each=0.15)
    assert sum(wrong[:40]) and not sum(wrong[-40:])
    right = drafted(list(range(100, 110)) * 20)
    assert len(right) < 60 and min(right[-10:]) > 2
    short = drafted([token for nth in range(100) for token in (100, 101, 102, 1000 + nth)], each=0.6)
    assert not sum(short[:20]) and 10 < sum(short[-60:]) <= 60


def test_what_a_grammar_forces_and_what_followed_it_elsewhere() -> None:
    tokenizer = ByteTokenizer()
    grammar = checked_grammar("regex", "(one|two) is [a-z]+ now!")
    sequences = Sequences(3, (EOS,), never)
    drafts = Drafts(3, fixed=10, forced=Forced(lambda: tokenizer.guide(320, (256,))))

    def start(text: str) -> int:
        limit = SamplingParams(max_tokens=99, grammar=grammar)
        slot = sequences.add(Request("", np.array(tokenizer.encode("Well?"), np.int32), limit))
        grow(sequences, slot, tokenizer.encode(text))
        return slot

    slot = start("")
    assert proposed(drafts, sequences, slot) == []
    grow(sequences, slot, tokenizer.encode("o"))
    assert bytes(proposed(drafts, sequences, slot)) == b"ne is "
    assert bytes(proposed(drafts, sequences, slot, most=2)) == b"ne"
    grow(sequences, slot, tokenizer.encode("ne is red"))
    assert bytes(proposed(drafts, sequences, slot)) == b""  # the word may be longer
    grow(sequences, slot, tokenizer.encode(" now!"))
    drafts.ends(sequences, slot)
    sequences.remove(slot)
    other = start("tw")
    assert bytes(proposed(drafts, sequences, other)) == b"o is red n"
    sequences.remove(other)
    again = start("o")
    assert bytes(proposed(drafts, sequences, again)) == b"ne is red "
    by_source = drafts.report()["by_source"]
    assert by_source == {"grammar": {"drafted": 2, "right": 2}}
    assert speculation(drafts.report()) == ["1.33 tokens a trip: draft tokens were right 2 of 2 from a grammar"]


def test_a_draft_model_is_asked_for_as_much_as_it_is_worth() -> None:
    """Where no text has been right more often, and not for longer than its own time allows."""

    class Counting:
        """Guesses that each token is followed by the next number."""

        def __init__(self, step_s: float):
            self.step_s = step_s

        def seconds(self, rows: int, steps: int) -> float:
            return self.step_s * steps

        def draft(self, sequences: Sequences, slots: IntArray, steps: int) -> IntArray:
            last = sequences.text(slots, sequences.length[slots, None] - 1)
            return last + np.arange(1, steps + 1, dtype=np.int32)

        def forget(self, slot: int) -> None:
            pass

    def cycle(rounds: int, sequences: int, prompts: int = 0, drafts: int = 0, drafting_s: float = 0.0) -> float:
        return 1.0 + 0.05 * drafts + drafting_s

    def drafted(step_s: float, answer: list[int]) -> list[list[int]]:
        sequences, drafts = Sequences(2, (EOS,), never), Drafts(2, cycle, model=Counting(step_s))
        slot, tokens = add(sequences, [50, 51], []), []
        for begin in range(0, len(answer), 20):
            tokens.append(proposed(drafts, sequences, slot))
            grow(sequences, slot, answer[begin : begin + 20])
        return tokens

    right = drafted(0.05, list(range(52, 152)))
    assert right[0] == list(range(52, 52 + len(right[0]))) and 2 < len(right[0]) < len(right[-1]) <= MOST
    assert 0 < len(drafted(0.3, [52])[0]) < len(right[0])
    assert not any(drafted(1.0, list(range(52, 72))))
    wrong = drafted(0.05, list(range(300, 9300, 4)))
    assert wrong[0] and not wrong[-1]


@settings(max_examples=60)
@given(
    texts=st.lists(
        st.tuples(st.lists(st.integers(10, 13), min_size=1, max_size=30), st.lists(st.integers(10, 13), max_size=30)),
        min_size=1,
        max_size=6,
    ),
    most=st.integers(0, 20),
    room=st.integers(0, 40),
)
def test_every_draft_continues_a_place_that_looked_alike(
    texts: list[tuple[list[int], list[int]]], most: int, room: int
) -> None:
    sequences, drafts = Sequences(8, (EOS,), never), Drafts(8, fixed=MOST)
    known = []
    for prompt, answer in texts[::2]:
        slot = add(sequences, prompt, answer)
        drafts.ends(sequences, slot)
        sequences.remove(slot)
        known.append([*prompt[-LEAD:], *answer])
    slots = np.array([add(sequences, *text) for text in texts], np.int32)
    counts = drafts.propose(sequences, slots, np.full(len(slots), most), room, 2, 0)
    assert (counts <= min(most, MOST)).all() and counts.sum() <= room
    for slot, count in zip(slots, counts.tolist(), strict=True):
        own = [*sequences.request(slot).prompt.tolist(), *sequences.output(slot).tolist()]
        wanted = [*own[-2:], *sequences.chunk(slot, int(sequences.length[slot]), count).tolist()]
        others = [sequences.request(other).prompt.tolist() + sequences.output(other).tolist() for other in slots]
        places = [text[at : at + len(wanted)] for text in [own, *others, *known] for at in range(len(text))]
        assert not count or wanted in places
