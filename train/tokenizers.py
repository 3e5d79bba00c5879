"""Tokenizers: UTF-8 bytes, which need no file and know every language, or any of Hugging Face's."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Protocol

from crossguard.configs.errors import UserError
from crossguard.configs.schema.encoders import BYTE_TOKENS, BYTES, TextEncoderConfig


class Tokenizer(Protocol):
    """What the encoding of posts needs of a tokenizer. Picklable."""

    pad_id: int
    vocab_size: int
    # Changes when any text could be encoded differently.
    fingerprint: str

    def encode(self, text: str, max_length: int) -> list[int]:
        """Token ids of `text`, special ones included: at least one, at most `max_length`."""
        ...

    def encode_further(self, text: str, max_length: int) -> list[int]:
        """Token ids of a text that stands behind another one: at least one and at most `max_length`, the last of them
        the token that ends a text, where the tokenizer has one."""
        ...

    def save(self, folder: Path) -> None:
        """Write what `load_tokenizer(config, folder)` needs."""
        ...


class ByteTokenizer:
    """One token a byte of UTF-8 (as ByT5, arXiv 2105.13626), between a first and a last token."""

    pad_id = 0
    first_id = 1
    last_id = 2
    first_byte_id = 3
    vocab_size = BYTE_TOKENS
    fingerprint = "bytes-1"

    def encode(self, text: str, max_length: int) -> list[int]:
        """Bytes beyond `max_length` are cut; what JSON allows but UTF-8 does not (lone surrogates) becomes `?`."""
        return [self.first_id, *self.encode_further(text, max_length - 1)]

    def encode_further(self, text: str, max_length: int) -> list[int]:
        """The same without the first token."""
        # No character takes less than a byte, so that a long text is not encoded as a whole to be cut.
        data = text[:max_length].encode("utf-8", errors="replace")[: max_length - 1]
        return [*(byte + self.first_byte_id for byte in data), self.last_id]

    def save(self, folder: Path) -> None:
        """Write the ids down for those who serve the model elsewhere; loading needs no file."""
        folder.mkdir(parents=True, exist_ok=True)
        ids = {name: getattr(self, name) for name in ("pad_id", "first_id", "last_id", "first_byte_id", "vocab_size")}
        (folder / "byte_tokenizer.json").write_text(json.dumps(ids, indent=2) + "\n", encoding="utf-8")


class HuggingFaceTokenizer:
    """Any tokenizer of `transformers`, with the special tokens that its encoder was trained with."""

    def __init__(self, tokenizer: Any, name: str):
        """
        Args:
            tokenizer: a `PreTrainedTokenizerBase`.
            name: how the user called it, for error messages.

        Raises:
            UserError: it has neither a padding nor an end token.
        """
        pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        if pad_id is None:
            raise UserError(f"model.text.tokenizer={name}: has no pad token; set one in its tokenizer_config.json")
        self.tokenizer = tokenizer
        self.pad_id: int = pad_id
        self.vocab_size = max(len(tokenizer), max(tokenizer.get_vocab().values()) + 1)
        self.fingerprint = _fingerprint(tokenizer)
        ends = (tokenizer.sep_token_id, tokenizer.eos_token_id)
        self.end_ids: list[int] = [end for end in ends if end is not None][:1]

    def encode(self, text: str, max_length: int) -> list[int]:
        """Tokens beyond `max_length` are cut, the special ones stay."""
        text = text.encode("utf-8", errors="replace").decode("utf-8")
        ids: list[int] = self.tokenizer(text, truncation=True, max_length=max_length, verbose=False)["input_ids"]
        # A tokenizer without special tokens turns an empty text into nothing, and an encoder needs something to read.
        return ids or [self.pad_id]

    def encode_further(self, text: str, max_length: int) -> list[int]:
        """Tokens beyond `max_length` are cut; separated like the two texts of a pair, or ended."""
        text = text.encode("utf-8", errors="replace").decode("utf-8")
        most = max_length - len(self.end_ids)
        ids: list[int] = self.tokenizer(
            text, truncation=True, max_length=most, add_special_tokens=False, verbose=False
        )["input_ids"]
        return ids + self.end_ids or [self.pad_id]

    def save(self, folder: Path) -> None:
        """Write a folder that `AutoTokenizer` reads."""
        self.tokenizer.save_pretrained(folder)


def load_tokenizer(config: TextEncoderConfig, folder: Path | None = None) -> Tokenizer:
    """The tokenizer that a configuration names.

    Args:
        config: `tokenizer` names it; by default that of `pretrained`, else bytes.
        folder: where `save` wrote it before; read instead of the named one.

    Raises:
        UserError: there is no such tokenizer.
    """
    name = config.tokenizer or config.pretrained or BYTES
    if name == BYTES:
        return ByteTokenizer()
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder or name))
    except (OSError, ValueError) as error:
        key = "tokenizer" if folder or config.tokenizer else "pretrained"
        raise UserError(
            f"model.text.{key}={folder or name}: neither a folder with a tokenizer nor one that the hub has "
            f"({_first_line(error)})"
        ) from error
    return HuggingFaceTokenizer(tokenizer, str(folder or name))


def _fingerprint(tokenizer: Any) -> str:
    """A hash of the rules, not of the folder they were read from."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        rules: Any = [type(tokenizer).__name__, tokenizer.get_vocab(), tokenizer.special_tokens_map]
    else:
        rules = json.loads(backend.to_str())
        # How the last call truncated and padded is kept in there too.
        rules.pop("truncation", None)
        rules.pop("padding", None)
    text = json.dumps(rules, sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8", errors="replace")).hexdigest()


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
