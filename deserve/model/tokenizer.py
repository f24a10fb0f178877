"""Text to token ids and back. Only rank 0 needs this, so transformers is imported where it is used."""

import json
import re
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar

from deserve.errors import RequestError, UserError
from deserve.model.checkpoint import Checkpoint
from deserve.model.tools import dialect

if TYPE_CHECKING:
    from llguidance import LLTokenizer

REASON = 300  # characters of a library's message that are passed on
SIMPLEST_CHATS = [
    [{"role": "user", "content": "a"}],
    [{"role": "system", "content": "a"}, {"role": "user", "content": "a"}],
]
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
GENERATION_TAG = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")  # transformers' own, unknown to Jinja

# strftime's, with glibc's forms without padding
DATE_PARTS = [f"%{flag}{letter}" for letter in "aAbBcdDeFGHIjmMpPSTuUVwWxXyYZ" for flag in ("", "-")]
# Takes the place of transformers' function of that name; a template is given data, not functions. Ends with an
# expression, behind which Jinja keeps a newline.
STRFTIME_NOW = (
    "{%- macro strftime_now(format) -%}{%- set date = namespace(text=format) -%}"
    "{%- for part, text in date_parts.items() -%}{%- set date.text = date.text.replace(part, text) -%}{%- endfor -%}"
    "{{- date.text -}}{%- endmacro -%}{{- '' }}"
)


@dataclass(frozen=True)
class ChatTemplate:
    """What a chat template understands: its variables, tool calls in a `dialect`, thoughts."""

    variables: frozenset[str] = frozenset()
    dialect: str | None = None
    thinks: bool = False

    @staticmethod
    def of(text: str) -> "ChatTemplate":
        """Raises ValueError where `text` is not a Jinja template."""
        from jinja2 import Environment, TemplateSyntaxError, meta

        try:
            syntax = Environment(extensions=["jinja2.ext.loopcontrols"]).parse(GENERATION_TAG.sub("", text))
        except TemplateSyntaxError as error:
            raise ValueError(f"not a Jinja template: line {error.lineno}: {error.message}") from error
        return ChatTemplate(frozenset(meta.find_undeclared_variables(syntax)), dialect(text), "</think>" in text)


class Tokenizer:
    """A checkpoint's own tokenizer. Raises UserError when its files cannot be loaded.

    `now` is the time that chat templates are told; None for the clock's. `chat_template` takes the place of the
    model's own.
    """

    def __init__(self, folder: Path, now: datetime | None = None, chat_template: str | None = None):
        self._now = now or datetime.now()
        try:
            self._tokenizer = _from_transformers(folder)
        except Exception as error:  # a tokenizer class may raise anything on a bad file
            reason = " ".join(str(error).split())[:REASON] or type(error).__name__
            raise UserError(f"{folder}: cannot load the tokenizer: {reason}") from error
        self._tokenizer.model_max_length = sys.maxsize  # whoever takes a prompt checks its length, without a warning
        if chat_template is not None:
            self._tokenizer.chat_template = chat_template
        self._tokenizer.truncation_side = "left"  # of prompts that ask to be cut
        self._templates: dict[bool, tuple[ChatTemplate, dict[str, Any]]] = {}  # by whether there are tools
        self._remarked = False  # that a prompt brought its own BOS

    @property
    def vocab_size(self) -> int:
        """Ids that encode to something; the model's own vocabulary may be padded beyond."""
        return len(self._tokenizer)

    @property
    def eos_id(self) -> int | None:
        """The token that ends a text."""
        eos: int | None = self._tokenizer.eos_token_id
        return eos

    @cached_property
    def longest_token(self) -> int:
        """Bytes of text that one token can stand for, at most; tokens of bytes are spelt with up to two bytes each."""
        return max((len(token.encode()) for token in self._tokenizer.get_vocab()), default=1)

    @cached_property
    def special_tokens(self) -> dict[str, int]:
        """The tokens that `decode` leaves out, by what they are called."""
        added = self._tokenizer.added_tokens_decoder
        return {token.content: number for number, token in added.items() if token.special}

    @property
    def vocabulary(self) -> dict[str, int]:
        """The ids of all tokens, by the tokenizer's own spelling of them."""
        return dict(self._tokenizer.get_vocab())

    def guide(self, vocab_size: int, ends: tuple[int, ...]) -> "LLTokenizer":
        """What grammars need to know of the tokens; one of `ends` follows a complete text. Takes a second."""
        from llguidance.hf import from_tokenizer

        return from_tokenizer(self._tokenizer, n_vocab=vocab_size, eos_token=list(ends))

    def encode(self, text: str, add_special_tokens: bool = True, at_most: int | None = None) -> list[int]:
        """Token ids of a text, by default with the special tokens that the model expects around a prompt.

        A text that begins with the BOS token gets no second one; the first such text is remarked on. A text of more
        than `at_most` tokens, special ones included, loses its beginning.
        """
        cut = {} if at_most is None else {"truncation": True, "max_length": at_most}
        ids: list[int] = list(self._tokenizer(text, add_special_tokens=add_special_tokens, **cut)["input_ids"])
        bos, bos_text = self._tokenizer.bos_token_id, self._tokenizer.bos_token
        if bos is not None and ids[:2] == [bos, bos] and text.startswith(bos_text):
            if not self._remarked:
                self._remarked = True
                print(f"deserve: prompts that begin with {bos_text} get no second one", file=sys.stderr, flush=True)
            del ids[0]
        return ids

    def chat_template(self, tools: bool = False) -> ChatTemplate:
        """What the chat template understands; a model may have another one for requests with `tools`.

        Raises RequestError when the model has no template, or a broken one.
        """
        return self._template(tools)[0]

    def _template(self, tools: bool) -> tuple[ChatTemplate, dict[str, Any]]:
        """What the chat template understands, and the arguments that make a template print the time `now`.

        transformers' own `strftime_now` takes the clock's.
        """
        if tools not in self._templates:
            if not self._tokenizer.chat_template:
                raise RequestError("no_chat_template", "the model has no chat template: send a prompt instead")
            try:
                text = self._tokenizer.get_chat_template(tools=[] if tools else None)
                understood = ChatTemplate.of(text)
            except ValueError as error:
                raise RequestError("no_chat_template", f"the model's chat template is unusable: {error}") from error
            dated: dict[str, Any] = {}
            if "strftime_now" in text:
                parts = {part: self._now.strftime(part) for part in DATE_PARTS}
                dated = {"chat_template": STRFTIME_NOW + text, "date_parts": parts}
            self._templates[tools] = understood, dated
        return self._templates[tools]

    def render_chat(
        self,
        messages: Sequence[dict[str, Any]],
        add_generation_prompt: bool = True,
        tools: list[dict[str, Any]] | None = None,
        **options: Any,
    ) -> str:
        """The text of a conversation, by default up to where the assistant answers, by the model's chat template.

        `options` are those of transformers' `apply_chat_template`, and the template's own variables.
        Raises RequestError when the model has no template or its template refuses the messages.
        """
        dated = self._template(tools is not None)[1]

        def render(messages: Sequence[dict[str, Any]]) -> str:
            return str(
                self._tokenizer.apply_chat_template(
                    list(messages),
                    add_generation_prompt=add_generation_prompt,
                    tokenize=False,
                    tools=tools,
                    **dated,
                    **options,
                )
            )

        def renders(messages: Sequence[dict[str, Any]]) -> bool:
            with suppress(Exception):
                render(messages)
                return True
            return False

        try:
            return render(messages)
        except Exception as error:  # a template is the model's program: it may fail in any manner
            if any(map(renders, SIMPLEST_CHATS)):
                raise RequestError("invalid_messages", f"the chat template refuses the messages: {error}") from error
            raise RequestError("no_chat_template", f"the chat template refuses all messages: {error}") from error

    def decode(self, ids: Iterable[int], show_special: bool = False) -> str:
        """The text of token ids, special tokens left out unless `show_special`."""
        tokens = [int(token) for token in ids]
        # Cleaning up would take away spaces that the model wrote.
        return str(
            self._tokenizer.decode(tokens, skip_special_tokens=not show_special, clean_up_tokenization_spaces=False)
        )

    def decode_batch(self, texts: Sequence[list[int]], show_special: bool = False) -> list[str]:
        """What `decode` makes of each of `texts`, in one call that lets other threads run meanwhile."""
        if not self._tokenizer.is_fast:
            return [self.decode(text, show_special) for text in texts]
        decoded: list[str] = self._tokenizer.backend_tokenizer.decode_batch(texts, skip_special_tokens=not show_special)
        return decoded


class ByteTokenizer:
    """Bytes as token ids, for a model without a tokenizer: 0..255, and 256 to end a text."""

    vocab_size = 257
    eos_id = 256
    longest_token = 1
    special_tokens: ClassVar[dict[str, int]] = {}

    def guide(self, vocab_size: int, ends: tuple[int, ...]) -> "LLTokenizer":
        """What grammars need to know of the tokens."""
        from llguidance import LLTokenizer, TokenizerWrapper

        return LLTokenizer(TokenizerWrapper(_Bytes()), n_vocab=vocab_size, eos_token=list(ends))

    def encode(self, text: str, add_special_tokens: bool = True, at_most: int | None = None) -> list[int]:
        """The last `at_most` of the UTF-8 bytes of the text; there are no special tokens to add."""
        return list(text.encode())[-(at_most or 0) :]

    def chat_template(self, tools: bool = False) -> ChatTemplate:
        """There is no template: messages are all that is understood."""
        return ChatTemplate()

    def render_chat(self, messages: Sequence[dict[str, Any]], **options: Any) -> str:
        """One line for each message, `role: content`, and the beginning of the answer's.

        Of the `options` of transformers' `apply_chat_template` two are known, `add_generation_prompt` and
        `continue_final_message`.

        Raises RequestError for a message without role or content.
        """
        try:
            lines = "".join(f"{message['role']}: {message['content']}\n" for message in messages)
        except (KeyError, TypeError) as error:
            raise RequestError("invalid_messages", "a message needs role and content") from error
        if options.get("continue_final_message"):
            return lines.removesuffix("\n")
        return f"{lines}assistant: " if options.get("add_generation_prompt", True) else lines

    def decode(self, ids: Iterable[int], show_special: bool = False) -> str:
        """The text of the bytes among the ids; what is no UTF-8 becomes the replacement character."""
        return bytes(token for token in map(int, ids) if token < 256).decode(errors="replace")

    def decode_batch(self, texts: Sequence[list[int]], show_special: bool = False) -> list[str]:
        """What `decode` makes of each of `texts`."""
        return [self.decode(text) for text in texts]


def has_tokenizer(folder: Path) -> bool:
    """Whether a model folder carries a tokenizer at all."""
    return any((folder / name).is_file() for name in TOKENIZER_FILES)


class _Bytes:
    """The ByteTokenizer as llguidance wants to see one."""

    eos_token_id = ByteTokenizer.eos_id
    bos_token_id = None
    tokens: ClassVar[list[bytes]] = [*(bytes([byte]) for byte in range(256)), b"<end>"]
    special_token_ids: ClassVar[list[int]] = [ByteTokenizer.eos_id]

    def __call__(self, text: str | bytes) -> list[int]:
        return list(text.encode() if isinstance(text, str) else text)


def _from_transformers(folder: Path) -> Any:
    """The tokenizer of `folder`, of the class that AutoTokenizer chooses.

    AutoTokenizer reads the sources of all models first: 1.2 CPU seconds of a start. For a Llama whose files name the
    plain class it chooses that one (in transformers 5.0 and later; of other models it may know better).
    """
    config = _stated_config(folder)
    if config is not None and (config.model_type, config.tokenizer_class) == ("llama", "PreTrainedTokenizerFast"):
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, config=config, local_files_only=True, trust_remote_code=False)


def _stated_config(folder: Path) -> SimpleNamespace | None:
    """`config.json` as it stands, where that is all that the choice of the tokenizer's class depends on.

    transformers' own class for it imports most of the library: a second of a start of two.
    """
    try:
        config, stated = (json.loads((folder / f"{name}.json").read_text()) for name in ("config", "tokenizer_config"))
        if not stated.get("tokenizer_class"):
            return None
        own = None if "auto_map" in stated else stated["tokenizer_class"]
        return SimpleNamespace(**{"model_type": "", **config, "_name_or_path": str(folder), "tokenizer_class": own})
    except (OSError, ValueError, AttributeError, TypeError):  # no such files, or not as expected: see there
        return None


def end_ids(checkpoint: Checkpoint, tokenizer: Tokenizer | ByteTokenizer | None) -> tuple[int, ...]:
    """Every token that ends a text, by whichever of the model's files."""
    own = tokenizer.eos_id if tokenizer is not None else None
    return tuple({*checkpoint.eos_ids, *([] if own is None else [own])})


def load_tokenizer(
    checkpoint: Checkpoint, now: datetime | None = None, chat_template: str | None = None
) -> Tokenizer | ByteTokenizer | None:
    """The checkpoint's tokenizer; bytes for `tiny`; None, so token ids alone, for other models without one.

    `now` is the time that chat templates are told; None for the clock's. `chat_template` names a file to take the
    place of the model's own template.

    Raises UserError when the tokenizer's files, or that one, cannot be loaded.
    """
    template = None if chat_template is None else _read_template(Path(chat_template).expanduser())
    if template is not None and (checkpoint.folder is None or not has_tokenizer(checkpoint.folder)):
        raise UserError(f"workload.chat_template={chat_template}: the model has no tokenizer to use it with")
    if checkpoint.folder is None:
        return ByteTokenizer() if checkpoint.name == "tiny" else None
    return Tokenizer(checkpoint.folder, now, template) if has_tokenizer(checkpoint.folder) else None


def _read_template(path: Path) -> str:
    try:
        text = path.read_text()
        ChatTemplate.of(text)
        return text
    except OSError as error:
        raise UserError(f"workload.chat_template={path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"workload.chat_template={path}: {error}") from error
