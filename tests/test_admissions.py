"""Admissions: what rank 0 says is what the last rank understands, and grammars travel once."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deserve.batch import ADMISSION_WORDS, Rules, SamplingParams
from deserve.model import admissions
from deserve.model.admissions import Decoder, Encoder, extra_words

TOKENS = st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=9)


@st.composite
def sampled(draw: st.DrawFn) -> SamplingParams:
    token = st.integers(0, 2**31 - 1)
    rules = Rules(
        frequency_penalty=draw(st.floats(-2, 2)),
        repetition_penalty=draw(st.floats(0.1, 2)),
        bias=tuple(draw(st.lists(st.tuples(token, st.floats(-100, 100)), max_size=3))),
        allowed=tuple(draw(st.lists(token, max_size=3))),
        banned=tuple(draw(st.lists(st.lists(token, min_size=1, max_size=3).map(tuple), max_size=3))),
        min_tokens=draw(st.integers(0, 9)),
        ends=tuple(draw(st.lists(token, max_size=3))),
    )
    return SamplingParams(
        min_p=draw(st.floats(0, 1)),
        rules=draw(st.sampled_from([rules, Rules()])),
        grammar=draw(st.sampled_from([None, "a", "bé", '{"c": [1]}'])),
        logprobs=draw(st.sampled_from([None, 0, 20])),
    )


@given(wanted=st.lists(st.tuples(sampled(), TOKENS), max_size=12), kept=st.integers(1, 3))
def test_what_is_said_is_understood(wanted: list[tuple[SamplingParams, list[int]]], kept: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(admissions, "KEPT", kept)
        encoder, decoder = Encoder((7,)), Decoder()
        for sampling, tokens in wanted:
            ids = np.array(tokens, np.int32)
            words = encoder.words(3, sampling, len(ids), ids)
            assert words.dtype == np.int32 and len(words) - ADMISSION_WORDS <= extra_words(sampling, len(ids))
            extras = decoder.extras(words)
            if sampling.plain:
                assert extras is None
                continue
            assert extras is not None and (extras.min_p, extras.logprobs) == (sampling.min_p, sampling.logprobs)
            assert extras.grammar == sampling.grammar and extras.prompt == len(ids)
            ends = sampling.rules.ends if sampling.rules == Rules() else (7, *sampling.rules.ends)
            assert extras.rules == Rules(**{**vars(sampling.rules), "ends": ends})
            looks_back = sampling.rules.looks_back or sampling.grammar is not None
            assert extras.tokens.tolist() == (tokens if looks_back else [])


def test_a_grammar_travels_once() -> None:
    encoder, prompt = Encoder(()), np.zeros(1, np.int32)
    sizes = [len(encoder.words(0, SamplingParams(grammar="x" * 4000), 1, prompt)) for _ in range(3)]
    assert sizes[0] > 1000 and sizes[1] == sizes[2] < 50
