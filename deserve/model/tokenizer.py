"""Text to token ids and back. Only rank 0 needs this, so transformers is imported where it is used."""

import sys
from collections.abc import Iterable, Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from deserve.errors import RequestError, UserError
from deserve.model.checkpoint import Checkpoint

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")

# strftime's, with glibc's forms without padding
DATE_PARTS = [f"%{flag}{letter}" for letter in "aAbBcdDeFGHIjmMpPSTuUVwWxXyYZ" for flag in ("", "-")]
# Takes the place of transformers' function of that name; a template is given data, not functions. Ends with an
# expression, behind which Jinja keeps a newline.
STRFTIME_NOW = (
    "{%- macro strftime_now(format) -%}{%- set date = namespace(text=format) -%}"
    "{%- for part, text in date_parts.items() -%}{%- set date.text = date.text.replace(part, text) -%}{%- endfor -%}"
    "{{- date.text -}}{%- endmacro -%}{{- '' }}"
)


class Tokenizer:
    """A checkpoint's own tokenizer. Raises UserError when its files cannot be loaded.

    `now` is the time that chat templates are told; None for the clock's.
    """

    def __init__(self, folder: Path, now: datetime | None = None):
        self._now = now or datetime.now()
        from transformers import AutoTokenizer

        try:
            self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # a tokenizer class may raise anything on a bad file
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(f"{folder}: cannot load the tokenizer: {reason}") from error
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
    def _dated(self) -> dict[str, Any]:
        """Arguments for a chat template that prints the date: transformers' own `strftime_now` takes the clock's."""
        template = self._tokenizer.get_chat_template()
        if "strftime_now" not in template:
            return {}
        parts = {part: self._now.strftime(part) for part in DATE_PARTS}
        return {"chat_template": STRFTIME_NOW + template, "date_parts": parts}

    @cached_property
    def special_tokens(self) -> dict[str, int]:
        """The tokens that `decode` leaves out, by what they are called."""
        added = self._tokenizer.added_tokens_decoder
        return {token.content: number for number, token in added.items() if token.special}

    def encode(self, text: str) -> list[int]:
        """Token ids of a completion's prompt, with the special tokens that the model expects around it.

        A text that begins with the BOS token gets no second one; the first such text is remarked on.
        """
        ids: list[int] = list(self._tokenizer(text)["input_ids"])
        bos, bos_text = self._tokenizer.bos_token_id, self._tokenizer.bos_token
        if bos is not None and ids[:2] == [bos, bos] and text.startswith(bos_text):
            if not self._remarked:
                self._remarked = True
                print(f"deserve: prompts that begin with {bos_text} get no second one", file=sys.stderr, flush=True)
            del ids[0]
        return ids

    def encode_chat(self, messages: Sequence[dict[str, Any]]) -> list[int]:
        """Token ids of a conversation up to where the assistant answers, by the model's chat template.

        Raises RequestError when the model has no template or its template refuses the messages.
        """
        if not self._tokenizer.chat_template:
            raise RequestError("no_chat_template", "the model has no chat template: send a prompt instead")
        try:
            ids = self._tokenizer.apply_chat_template(
                list(messages),
                add_generation_prompt=True,
                tokenize=True,
                return_dict=False,
                **self._dated,
            )
        except Exception as error:  # a template is the model's program: it may fail in any manner
            raise RequestError("invalid_messages", f"the chat template refuses the messages: {error}") from error
        return list(ids)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids, special tokens left out."""
        tokens = [int(token) for token in ids]
        # Cleaning up would take away spaces that the model wrote.
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))


class ByteTokenizer:
    """Bytes as token ids, for a model without a tokenizer: 0..255, and 256 to end a text."""

    vocab_size = 257
    eos_id = 256
    longest_token = 1
    special_tokens: ClassVar[dict[str, int]] = {}

    def encode(self, text: str) -> list[int]:
        """The UTF-8 bytes of the text."""
        return list(text.encode())

    def encode_chat(self, messages: Sequence[dict[str, Any]]) -> list[int]:
        """One line for each message, `role: content`, and the beginning of the answer's.

        Raises RequestError for a message without role or content.
        """
        try:
            lines = "".join(f"{message['role']}: {message['content']}\n" for message in messages)
        except (KeyError, TypeError) as error:
            raise RequestError("invalid_messages", f"a message needs role and content: {error!r}") from error
        return self.encode(f"{lines}assistant: ")

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the bytes among the ids; what is no UTF-8 becomes the replacement character."""
        return bytes(token for token in map(int, ids) if token < 256).decode(errors="replace")


def has_tokenizer(folder: Path) -> bool:
    """Whether a model folder carries a tokenizer at all."""
    return any((folder / name).is_file() for name in TOKENIZER_FILES)


def load_tokenizer(checkpoint: Checkpoint, now: datetime | None = None) -> Tokenizer | ByteTokenizer | None:
    """The checkpoint's tokenizer; bytes for `tiny`; None, so token ids alone, for other models without one.

    `now` is the time that chat templates are told; None for the clock's.

    Raises UserError when the tokenizer's files cannot be loaded.
    """
    if checkpoint.folder is None:
        return ByteTokenizer() if checkpoint.name == "tiny" else None
    return Tokenizer(checkpoint.folder, now) if has_tokenizer(checkpoint.folder) else None
