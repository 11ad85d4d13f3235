"""The tokenizer of every job: it wraps a Hugging Face tokenizer. No other code adds BOS or EOS."""

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache, cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from nemo_eppo.config import ConfigError
from nemo_eppo.files import write_json

if TYPE_CHECKING:
    from tokenizers import Tokenizer as BackendTokenizer
    from transformers import PreTrainedTokenizerBase

EOS, PAD = "<eos>", "<pad>"
_BYTES = 256  # byte-level BPE starts from one token per byte
_TOKENISED_AT_ONCE = 2048  # texts: enough to keep the tokenizer's threads busy

logger = logging.getLogger(__name__)
_log_once = cache(logger.info)  # INFO, as ranks other than 0 log warnings only


class Tokenizer:
    """Turns text into token ids and back.

    A sequence is an encoded prompt and an encoded response: each is encoded without the other and the ids are
    concatenated, so a prompt has the same tokens before every response.
    """

    eos_id: int
    """Id of EOS, which ends every complete response."""
    eos_text: str
    """EOS as text."""
    pad_id: int
    """Id of the padding at the right of batches: the tokenizer's pad token or, with a notice, EOS if it has none."""
    bos_id: int | None
    """Id of BOS, which begins a prompt; None if the tokenizer has none."""
    vocab_size: int
    """Number of token ids, added tokens included."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", source: str) -> None:
        if tokenizer.eos_token_id is None:
            raise ConfigError(f"tokenizer '{source}' has no eos_token (in tokenizer_config.json): responses cannot end")
        self._tokenizer = tokenizer
        self.eos_id, self.eos_text = tokenizer.eos_token_id, tokenizer.eos_token
        self.vocab_size = len(tokenizer)
        if tokenizer.pad_token_id is None:
            _log_once(f"tokenizer '{source}' has no pad_token: padding with its EOS, id {self.eos_id}")
            self.pad_id = self.eos_id
        else:
            self.pad_id = tokenizer.pad_token_id
        self.bos_id = tokenizer.bos_token_id
        self._bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        self._adds_bos = bool(self._bos) and tokenizer("")["input_ids"][:1] == self._bos

    @property
    def chat_template(self) -> str | None:
        """The template's Jinja source, which is saved with the tokenizer; None if it has none."""
        template: str | None = self._tokenizer.chat_template
        return template

    @chat_template.setter
    def chat_template(self, source: str) -> None:
        self._tokenizer.chat_template = source

    @classmethod
    def from_directory(cls, path: str | Path) -> "Tokenizer":
        """Load a tokenizer, from local files only.

        Raises:
            ConfigError: there is no such directory, transformers cannot load its files, or there is no EOS token.
        """
        if not Path(path).is_dir():
            raise ConfigError(f"tokenizer directory '{path}' does not exist (expected tokenizer.json and its config)")
        from transformers import AutoTokenizer

        try:
            # without trust_remote_code=False, transformers asks on a terminal whether to run the directory's code
            tokenizer = AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
        except Exception as error:  # the Rust loader raises bare Exceptions
            # the first line, without transformers' list of all models
            reason = str(error).strip().partition("\n")[0].partition(", or contain one of")[0]
            if not any(any(Path(path).glob(name)) for name in ("tokenizer.json", "*.model", "vocab.*")):
                reason = "it has no tokenizer.json, *.model or vocab.*"
            if "trust_remote_code" in str(error):
                reason = "it needs Python code of its own (auto_map in its settings), which is never run"
            raise ConfigError(f"tokenizer directory '{path}' cannot be loaded: {reason}") from error
        return cls(tokenizer, str(path))

    def encode_prompts(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode prompts, with one BOS in front if this tokenizer adds it or the text starts with it."""
        return [self._delimit(ids, begin=self._adds_bos, end=False) for ids in self.encode(texts)]

    def encode_responses(self, texts: Sequence[str], end: bool = True) -> list[list[int]]:
        """Encode responses without adding BOS; with `end`, each ends with exactly one EOS.

        Raises:
            ConfigError: a response contains EOS before its end.
        """
        encoded = self.encode(texts)
        for ids, text in zip(encoded, texts, strict=True):
            if self.eos_id in ids[:-1]:
                raise ConfigError(f"response contains the end-of-sequence token before its end: {text[:200]!r}")
        return [self._delimit(ids, begin=False, end=end) for ids in encoded]

    def _delimit(self, ids: list[int], *, begin: bool, end: bool) -> list[int]:
        """Add BOS if `begin` and it is missing, EOS if `end` and it is missing; of several BOS in front, keep one."""
        while ids[:2] == self._bos * 2 != []:  # a chat template may write BOS before a text that has it
            ids = ids[1:]
        if begin and ids[:1] != self._bos:
            ids = self._bos + ids
        if end and ids[-1:] != [self.eos_id]:
            ids = [*ids, self.eos_id]
        return ids

    def render_chat(self, turns: Sequence[Mapping[str, str]], add_generation_prompt: bool) -> str:
        """Format `{"role", "content"}` turns with the chat template, special tokens as text.

        Raises:
            jinja2.TemplateError: the template refuses these turns.
        """
        text = self._tokenizer.apply_chat_template(
            list(turns), tokenize=False, add_generation_prompt=add_generation_prompt
        )
        return str(text)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode texts without adding special tokens."""
        if not texts:
            return []
        try:
            encoded = self._tokenizer(
                list(texts),
                add_special_tokens=False,
                return_attention_mask=False,
                return_token_type_ids=False,
                verbose=False,
            )
        except Exception as error:  # Rust raises a bare one for a word outside a vocabulary without unknown token
            raise ConfigError(f"cannot be tokenised: {error} (texts from {texts[0][:80]!r} on)") from error
        return list(encoded["input_ids"])

    def encode_prompt(self, text: str) -> list[int]:
        """Encode one prompt as `encode_prompts` does."""
        return self.encode_prompts([text])[0]

    def decode(self, ids: Sequence[int], special_tokens: bool = False) -> str:
        """Turn `ids` into text, with or without the special tokens (EOS, padding, BOS)."""
        skip = not special_tokens
        return str(self._tokenizer.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False))

    def decode_batch(self, sequences: Sequence[Sequence[int]]) -> list[str]:
        """Decode many sequences at once, as `decode` does."""
        return self._tokenizer.batch_decode(sequences, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    @property
    def special_ids(self) -> dict[str, int]:
        """Map the text of each special token, which `decode` leaves out, to its id."""
        added = self._tokenizer.added_tokens_decoder
        return {token.content: index for index, token in added.items() if token.special}

    @cached_property
    def digest(self) -> str:
        """SHA-256 of vocabulary and special ids: with equal digests, token ids have equal meanings."""
        # cached: a large vocabulary takes 0.3 s, and every status request reads the digest
        content = [sorted(self._tokenizer.get_vocab().items()), self._bos, self._adds_bos, self.eos_id, self.pad_id]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def save(self, path: str | Path) -> None:
        """Write the files that `from_directory` reads."""
        self._tokenizer.save_pretrained(str(path))


ItemT = TypeVar("ItemT")
EncodedT = TypeVar("EncodedT")


def encode_in_blocks(
    items: Iterable[ItemT], encode: Callable[[list[ItemT]], Sequence[EncodedT]]
) -> Iterator[tuple[ItemT, EncodedT | ConfigError]]:
    """Tokenise items in blocks, which is faster; an item that cannot be tokenised does not affect the others.

    Args:
        items: a stream, which may be larger than memory.
        encode: returns the result of each given item, or raises ConfigError if one cannot be tokenised.

    Yields:
        each item with its result, or with its error.
    """

    def encode_alone(item: ItemT) -> EncodedT | ConfigError:
        try:
            return encode([item])[0]
        except ConfigError as error:
            return error

    items = iter(items)
    while block := list(islice(items, _TOKENISED_AT_ONCE)):
        encoded: list[EncodedT | ConfigError]
        try:
            encoded = [*encode(block)]
        except ConfigError:
            encoded = [encode_alone(item) for item in block]
        yield from zip(block, encoded, strict=True)


def train_bpe(texts: Iterable[str], vocab_size: int, out_dir: Path) -> None:
    """Train a byte-level BPE tokenizer (any text round-trips) and save it for `Tokenizer.from_directory`.

    `texts` is streamed. `vocab_size` includes the special tokens; a small corpus may give fewer tokens.
    """
    from tokenizers import Tokenizer as BackendTokenizer
    from tokenizers import decoders, models, pre_tokenizers, trainers

    smallest = _BYTES + len((EOS, PAD))
    if vocab_size < smallest:
        raise ConfigError(f"vocab_size = {vocab_size}: byte-level BPE needs at least {smallest} (bytes, {EOS}, {PAD})")
    tokenizer = BackendTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    _save(tokenizer, out_dir)


def word_level(words: Sequence[str], out_dir: Path) -> None:
    """Save a tokenizer whose tokens are EOS, PAD and `words`; text is split at whitespace and decoded with spaces."""
    from tokenizers import Tokenizer as BackendTokenizer
    from tokenizers import models, pre_tokenizers

    vocabulary = {word: index for index, word in enumerate([EOS, PAD, *words])}
    tokenizer = BackendTokenizer(models.WordLevel(vocabulary))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([EOS, PAD])
    _save(tokenizer, out_dir)


def _save(tokenizer: "BackendTokenizer", out_dir: Path) -> None:
    """Write the two files that AutoTokenizer needs, without importing transformers, which takes seconds."""
    out_dir.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(out_dir / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": EOS,
        "pad_token": PAD,
        "clean_up_tokenization_spaces": False,
    }
    write_json(out_dir / "tokenizer_config.json", settings)
