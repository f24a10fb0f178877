"""Grammars: whatever is chosen among the tokens that they allow, the text keeps to the grammar."""

import json
import re

import numpy as np
import pytest
import torch
from llguidance import LLTokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from bench.schemas import problem, schemas
from deserve.errors import RequestError
from deserve.model.grammar import Grammars, checked_grammar

CPU = torch.device("cpu")
NOTHING = np.array([-1], np.int32)  # no draft token
WORDS = ['{"', '":', '": "', '"}', "name", "age", "true", "yes", "no", " ", "12", "é"]


@pytest.fixture(scope="module")
def tokenizer() -> tuple[LLTokenizer, Tokenizer]:
    """Bytes, and a few longer tokens; id 0 ends a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<eos>": 0, **{text: at for at, text in enumerate(alphabet, start=1)}}
    merges = []
    for word in WORDS:
        pieces = [piece for piece, _ in pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(word)]
        for piece in pieces:
            made = piece[0]
            for letter in piece[1:]:
                if made + letter not in vocab:
                    merges.append((made, letter))
                    vocab[made + letter] = len(vocab)
                made += letter
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<eos>"])
    return LLTokenizer(tokenizer.to_str(), eos_token=0), tokenizer


def completed(grammar: str, tokenizer: tuple[LLTokenizer, Tokenizer], seed: int, most: int = 400) -> str | None:
    """The text of random choices among what is allowed, None if it does not end."""
    guide, plain = tokenizer
    vocab = plain.get_vocab_size() + 7  # a model's vocabulary may be padded
    grammars = Grammars(guide, CPU)
    slots = np.array([3], np.int32)
    grammars.admit(3, grammar, np.zeros(0, np.int32))
    random = torch.Generator().manual_seed(seed)
    tokens: list[int] = []
    while len(tokens) < most:
        assert grammars.rows(np.array([1, 3], np.int32)).tolist() == [1]
        masks = grammars.masks(slots, NOTHING, vocab)
        logits = grammars.apply(torch.randn(1, vocab, generator=random), masks)
        logits[0, 0] += 2.0  # inclined to end
        token = logits.argmax(-1).int()
        if int(token) == 0:
            return str(plain.decode(tokens))
        tokens.append(int(token))
        grammars.record(token, slots, NOTHING)
    return None


def test_choices_regexes_and_schemas_are_kept_to(tokenizer: tuple[LLTokenizer, Tokenizer]) -> None:
    choice = checked_grammar("choice", ["yes", "no", "né"])
    assert {completed(choice, tokenizer, seed) for seed in range(20)} == {"yes", "no", "né"}
    regex = checked_grammar("regex", "[a-c]{2}(12)+x?")
    texts = [completed(regex, tokenizer, seed) for seed in range(20)]
    assert all(text is None or re.fullmatch("[a-c]{2}(12)+x?", text) for text in texts)
    schema = {
        "type": "object",
        "properties": {"name": {"enum": ["age", "yes"]}, "age": {"type": "boolean"}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    compact = checked_grammar("json_schema", json.dumps(schema), compact=True)
    assert completed(compact, tokenizer, 0) in {
        f'{{"name":"{name}","age":{age}}}' for name in ("age", "yes") for age in ("true", "false")
    }
    grammar = checked_grammar("json_schema", json.dumps(schema))
    for seed in range(20):
        text = completed(grammar, tokenizer, seed)
        if text is not None:
            found = json.loads(text)
            assert found["name"] in ("age", "yes") and isinstance(found["age"], bool) and len(found) == 2


def test_a_sequence_goes_on_where_its_output_ends(tokenizer: tuple[LLTokenizer, Tokenizer]) -> None:
    guide, plain = tokenizer
    grammars = Grammars(guide, CPU)
    grammar = checked_grammar("choice", ["yes", "no"])
    output = np.array(plain.encode("n").ids, np.int32)
    grammars.admit(0, grammar, output)
    grammars.admit(1, grammar, np.zeros(0, np.int32))
    masks = grammars.masks(np.array([0, 1], np.int32), np.repeat(NOTHING, 2), plain.get_vocab_size())
    open_ = grammars.apply(torch.zeros(2, plain.get_vocab_size()), masks).isfinite()
    allowed = [{plain.decode([token]) for token in row.nonzero()[:, 0].tolist()} for row in open_]
    assert allowed[0] == {"o"} and {"n", "y"} <= allowed[1] and "o" not in allowed[1]
    grammars.admit(0, None, output)
    assert grammars.rows(np.array([0, 1], np.int32)).tolist() == [1]


def test_masks_behind_draft_tokens(tokenizer: tuple[LLTokenizer, Tokenizer]) -> None:
    """Each is the mask of a sequence that has these tokens; only what was right is taken in."""
    guide, plain = tokenizer
    vocab, slots = plain.get_vocab_size(), np.array([0, 0, 0, 1], np.int32)
    grammar = checked_grammar("regex", "(ab|cd){6}")
    a, b, c, d = (plain.token_to_id(letter) for letter in "abcd")
    grammars = Grammars(guide, CPU)
    for slot in (0, 1):
        grammars.admit(slot, grammar, np.zeros(0, np.int32))

    def allowed(assumed: list[int]) -> list[set[int]]:
        masks = grammars.masks(slots, np.array(assumed, np.int32), vocab)
        return [
            {*row.nonzero()[:, 0].tolist()} & {a, b, c, d}
            for row in grammars.apply(torch.zeros(4, vocab), masks).isfinite()
        ]

    assert allowed([a, b, -1, -1]) == [{a, c}, {b}, {a, c}, {a, c}]
    grammars.record(torch.tensor([a, b, c, c], dtype=torch.int32), slots, np.array([a, b, -1, -1], np.int32))
    assert allowed([d, d, -1, -1]) == [{d}, {a, c}, set(), {d}]  # the second draft is not allowed
    grammars.record(torch.tensor([d, a, a, d], dtype=torch.int32), slots, np.array([d, d, -1, -1], np.int32))
    assert allowed([c, a, -1, -1]) == [{b}, set(), set(), {a, c}]
    grammars.record(torch.tensor([b, a, a, a], dtype=torch.int32), slots, np.array([c, a, -1, -1], np.int32))
    assert allowed([c, d, -1, -1]) == [{a, c}, {d}, {a, c}, {b}]
    undecided = np.array([-3], np.int32)  # it will be asked for again
    before = grammars.masks(np.array([1], np.int32), NOTHING, vocab).copy()
    grammars.record(torch.from_numpy(undecided), np.array([1], np.int32), NOTHING)
    assert np.array_equal(grammars.masks(np.array([1], np.int32), NOTHING, vocab), before)
    plain_slots, both = np.array([1], np.int32), np.array([1, 0, 0], np.int32)
    assert grammars.masks(plain_slots, NOTHING, vocab).any()
    assert grammars.masks(both, np.array([-1, c, -1], np.int32), vocab).any(1).all()


@pytest.mark.parametrize(
    ("kind", "text"),
    [("json_schema", '{"type": "no such type"}'), ("regex", "(["), ("grammar", "nonsense"), ("json_schema", "{")],
)
def test_what_cannot_be_compiled_is_refused(kind: str, text: str) -> None:
    with pytest.raises(RequestError, match=f"the {kind} cannot be compiled"):
        checked_grammar(kind, text)


def test_answers_to_varied_schemas_validate(tokenizer: tuple[LLTokenizer, Tokenizer]) -> None:
    """Random text within each; `python -m bench.schemas` asks a model for 200."""
    ended = 0
    for of in schemas(40):
        text = completed(checked_grammar("json_schema", json.dumps(of), tokenizer=tokenizer[0]), tokenizer, 1, most=100)
        if text is not None:
            ended += 1
            assert problem(text, of) is None, (text, of)
    assert ended > 20
    with pytest.raises(RequestError, match=r"json_schema cannot be compiled.*uniqueItems"):
        checked_grammar("json_schema", '{"type": "array", "uniqueItems": true}', tokenizer=tokenizer[0])
