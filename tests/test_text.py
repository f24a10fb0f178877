"""Texts at their edges: against the plain definition, on tokenizers of every kind, built here."""

import json
import weakref
from datetime import datetime
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import pytest
from checkpoints import make_checkpoint, save_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from deserve.batch import Completion, Request, Rules, SamplingParams
from deserve.config import load_config
from deserve.job import Job
from deserve.model.checkpoint import resolve
from deserve.model.tokenizer import ByteTokenizer, Tokenizer
from deserve.model.tools import Answer
from deserve.text import BROKEN, Detokenizer, StopFinder

PIECES = ["▁", "a", "b", ".", "▁a", "▁b", "ab", "▁ab", "▁▁", "aa", "é", "€"]
MERGES = [("▁", "a"), ("▁", "b"), ("a", "b"), ("▁", "ab"), ("▁", "▁"), ("a", "a")]
SPECIAL = ["<unk>", "<s>", "</s>", "<|im_end|>"]


def sentencepiece(kind: str) -> Backend:
    """A tokenizer as transformers converts SentencePiece models to: Llama 2's (`llama`) or a plain `metaspace`."""
    spelt = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *PIECES]
    backend = Backend(
        models.BPE({piece: number for number, piece in enumerate(spelt)}, MERGES, byte_fallback=True, unk_token="<unk>")
    )
    if kind == "llama":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        backend.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        backend.decoder = decoders.Metaspace(prepend_scheme="first")
    backend.add_special_tokens(SPECIAL)
    backend.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    return backend


@cache
def tokenizer(kind: str) -> Any:
    if kind in ("none", "bytes"):
        return None if kind == "none" else ByteTokenizer()
    folder = Path(mkdtemp())
    if kind == "bytelevel":
        return Tokenizer(save_tokenizer(folder))
    sentencepiece(kind).save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": True}
    settings |= {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return Tokenizer(folder)


KINDS = ("llama", "metaspace", "bytelevel", "bytes")


def ids(*tokens: int) -> np.ndarray:
    return np.array(tokens, np.int32)


def found(kind: str, prompt: np.ndarray, tokens: np.ndarray, *stops: str, early: int = 0) -> tuple[int, str] | None:
    """After how many tokens a stop string is found, of which `early` may end none, and the text before it."""
    request = Request("", prompt, SamplingParams(stop=stops, rules=Rules(min_tokens=early)))
    finder = StopFinder(Detokenizer(tokenizer(kind)))
    for count in range(1, len(tokens) + 1):
        (cut,) = finder([request], [tokens[:count]])
        if cut is not None:
            return cut
    return None


def defined(kind: str, prompt: np.ndarray, tokens: np.ndarray, *stops: str, early: int = 0) -> tuple[int, str] | None:
    """The same by definition: the first stop string in the whole text, as soon as there is one.

    As in vLLM, one that ends within the text of the first `early` tokens does not count.
    """
    detokenizer = Detokenizer(tokenizer(kind))
    stop_ids = [detokenizer.special[stop] for stop in stops if stop in detokenizer.special]
    before = len(detokenizer.text(prompt, tokens[:early])) if early else 0
    for count in range(early + 1, len(tokens) + 1):
        text = detokenizer.text(prompt, tokens[:count])
        ends = [(at, at + len(stop)) for stop in stops for at in range(len(text)) if text.startswith(stop, at)]
        cuts = [at for at, end in ends if end > before]
        if cuts or tokens[count - 1] in stop_ids:
            return count, text[: min(cuts, default=len(text))]
    return None


@st.composite
def outputs(draw: Any) -> tuple[str, np.ndarray, np.ndarray, tuple[str, ...]]:
    """A kind of tokenizer, prompt, output, and stop strings of which some come up."""
    kind = draw(st.sampled_from(("none", *KINDS)))
    own = tokenizer(kind)
    size = 300 if own is None else own.vocab_size
    likely = st.sampled_from([*range(4), *range(size - 14, size), 0xE2 + 4, 0x82 + 4, 0xAC + 4, 0x61 + 4])
    token = st.integers(0, size - 1) | likely
    if own is not None:  # tokens of characters that several of them make
        words = {tuple(own.encode(text)) for text in ("€", "😀", " a", "ab.", "é€ ")}
        token = st.one_of(token.map(lambda one: (one,)), st.sampled_from(sorted(words)))
        flat = st.lists(token, max_size=12).map(lambda parts: [one for part in parts for one in part])
    else:
        flat = st.lists(token, max_size=12)
    prompt, tokens = ids(*draw(flat)), ids(*draw(flat))
    text = Detokenizer(own).text(prompt, tokens)
    begin = draw(st.integers(0, max(0, len(text) - 1)))
    pieces = [
        text[begin : begin + draw(st.integers(1, 5))],
        draw(st.sampled_from(["ab", " ", "€", "<|im_end|>", "xyz"])),
    ]
    return kind, prompt, tokens, tuple(piece for piece in pieces if piece and BROKEN not in piece) or ("xyz",)


@settings(max_examples=300)
@given(outputs())
def test_stop_strings_are_found_where_the_text_has_them(case: tuple[Any, ...]) -> None:
    kind, prompt, tokens, stops = case
    for early in (0, len(tokens) // 2):
        assert found(kind, prompt, tokens, *stops, early=early) == defined(kind, prompt, tokens, *stops, early=early)


def test_what_is_known_of_an_answer_goes_with_its_request() -> None:
    """A job of a million lines must not keep something of each."""
    finder = StopFinder(Detokenizer(tokenizer("bytes")))
    requests = [Request(str(nth), ids(64), SamplingParams(stop=("never",))) for nth in range(4)]
    finder(requests, [ids(65)] * 4)
    forgotten = weakref.ref(requests.pop())
    assert forgotten() is None and len(finder._tails) == 3


@settings(max_examples=300)
@given(outputs())
def test_prompt_and_text_read_as_one(case: tuple[Any, ...]) -> None:
    kind, prompt, tokens, _ = case
    detokenizer = Detokenizer(tokenizer(kind))
    text = detokenizer.text(prompt, tokens)
    if kind == "none":
        assert text == " ".join(map(str, tokens.tolist()))
        return
    before, whole = (detokenizer.decode(part.tolist()) for part in (prompt, np.concatenate([prompt, tokens])))
    if whole.startswith(before):
        assert text == whole[len(before) :]
    elif before.endswith(BROKEN):
        assert text.endswith(whole[len(before.rstrip(BROKEN)) :])


def encoded(kind: str, text: str) -> np.ndarray:
    return ids(*tokenizer(kind).encode(text))


@pytest.mark.parametrize("kind", ["llama", "metaspace"])
def test_the_space_before_the_first_word_is_kept(kind: str) -> None:
    """Behind text; at the beginning of all there is none."""
    detokenizer, word = Detokenizer(tokenizer(kind)), ids(264)
    assert detokenizer.decode([264]) == "a"
    assert detokenizer.text(encoded(kind, "b"), word) == " a"
    assert detokenizer.text(ids(265, 3, 3, *[1] * 40), word) == " a"  # behind special tokens, however many
    assert detokenizer.text(ids(1), word) == detokenizer.text(ids(), word) == "a"
    assert found(kind, encoded(kind, "b"), word, " a") == (1, "")
    assert found(kind, ids(1), word, " a") is None


@pytest.mark.parametrize("kind", ["llama", "bytelevel", "bytes"])
def test_a_character_may_lie_on_both_sides_of_the_prompt_s_end(kind: str) -> None:
    detokenizer, whole = Detokenizer(tokenizer(kind)), encoded(kind, "ab€😀" * 20)
    for end in range(len(whole)):
        text = detokenizer.text(whole[:end], whole[end:])
        assert text and ("ab€😀" * 20).endswith(text) and BROKEN not in text


@pytest.mark.parametrize("kind", ["llama", "bytelevel", "bytes"])
def test_an_answer_cut_within_a_character_ends_broken(kind: str) -> None:
    """As transformers decodes it."""
    prompt, tokens = encoded(kind, "b"), encoded(kind, "a" + "😀")
    text = Detokenizer(tokenizer(kind)).text(prompt, tokens[:-1])
    assert text.endswith(BROKEN) and text.rstrip(BROKEN).endswith("a")
    assert found(kind, prompt, tokens[:-1], "😀") is None
    assert found(kind, prompt, tokens, "😀") == (len(tokens), text.rstrip(BROKEN))


def test_a_stop_string_may_begin_in_the_prompt_s_last_character() -> None:
    """A character of three bytes, of which the prompt has the first and no two together are one."""
    assert found("bytelevel", ids(156), ids(94, 247), "࡙") == (2, "")


def test_stop_strings_and_special_tokens() -> None:
    a, b, end, im_end = 264, 265, 2, 3
    # Tokens without text come between the parts of a stop string, however many
    assert found("llama", ids(b), ids(a, *[end] * 50, b, a), "a b") == (52, " ")
    # A special token is a stop string by its name
    assert found("llama", ids(b), ids(a, im_end, b), "never", "<|im_end|>") == (2, " a")
    assert found("bytelevel", ids(64), ids(64, 256, 65), "<|end|>") == (2, "a")
    # One that is not among the stop strings has no text, and an added one that is not special has
    assert Detokenizer(tokenizer("llama")).text(ids(b), ids(a, end, a)) == " a a"
    assert found("llama", ids(b), ids(a, 272, b), "<think>") == (2, " a")


def test_spaces_before_punctuation_are_the_model_s_own() -> None:
    """Although the tokenizer's files ask for them to be cleaned up."""
    assert Detokenizer(tokenizer("llama")).text(ids(1, 265), ids(264, 260, 263)) == " a ."


@pytest.mark.parametrize(("reason", "text"), [("stop", " a"), ("length", " a b")])
def test_the_token_that_ends_an_answer_is_no_text(reason: str, text: str) -> None:
    """Be it an ordinary one. An answer in token ids shows all."""
    completion = Completion(Request("", ids(265)), ids(264, 265), reason)
    assert Detokenizer(tokenizer("llama")).completion(completion) == text
    assert Detokenizer(None).completion(completion) == "264 265"


@pytest.mark.parametrize("kind", KINDS)
def test_a_stop_string_costs_a_few_tokens_for_each(kind: str) -> None:
    """However long the answer, and whatever it consists of."""
    random = np.random.default_rng(0)
    for tokens in (random.integers(tokenizer(kind).vocab_size, size=2000), np.full(2000, 2), np.full(2000, 0xE2)):
        detokenizer, decoded = Detokenizer(tokenizer(kind)), []
        decode, decode_batch = detokenizer.decode, detokenizer.decode_batch

        def counted(some: list[int], decode: Any = decode, decoded: list[int] = decoded) -> Any:
            decoded.append(len(some))
            return decode(some)

        def all_counted(some: list[list[int]], decode: Any = decode_batch, decoded: list[int] = decoded) -> Any:
            decoded.extend(map(len, some))
            return decode(some)

        detokenizer.decode, detokenizer.decode_batch = counted, all_counted
        finder, request = StopFinder(detokenizer), Request("", ids(64), SamplingParams(stop=("never",)))
        for count in range(1, 2001):
            assert finder([request], [tokens[:count].astype(np.int32)]) == [None]
        assert sum(decoded) < 40 * len(tokens)


def test_a_resumed_job_tells_the_template_the_date_of_its_first_start(tmp_path: Path) -> None:
    template = (
        "{% if strftime_now is defined %}{% set date = strftime_now('%d %B %Y (%-d/%m, %H:%M)') %}{% endif %}"
        "{{ date }} {{ messages[0].content }}"
    )
    folder = save_tokenizer(make_checkpoint(tmp_path), chat_template=template)
    source = tmp_path / "in.jsonl"
    source.write_text('{"messages": [{"role": "user", "content": "a"}]}')
    config = load_config([f"model.path={folder}", f"workload.source={source}", f"output.dir={tmp_path / 'out'}"])
    manifest = tmp_path / "out" / "manifest.json"

    def prompt() -> str:
        job = Job(config, resolve(config.model), resume=True)
        job._writer.completion(Completion(Request("other", ids(1)), ids(1), "stop"), Answer(""))  # something to resume
        job._writer.close()
        return job._tokenizer.render_chat([{"role": "user", "content": "a"}])

    first = prompt()
    began = datetime.fromisoformat(json.loads(manifest.read_text())["began"])
    assert first == f"{began:%d %B %Y (%-d/%m, %H:%M)} a"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"began": "2024-02-09T23:59:59"}))
    assert prompt() == prompt() == "09 February 2024 (9/02, 23:59) a"
