"""Prompt, SFT and preference data sets, tokenised when loaded, and the order in which training walks through them."""

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from nemo_eppo.config import ConfigError
from nemo_eppo.data.jsonl import read_jsonl
from nemo_eppo.data.tokenizer import Tokenizer

TokenIds = npt.NDArray[np.int32]
Row = tuple[str, TokenIds, list[TokenIds]]
TooLong = Literal["error", "drop"]

_TOKENISED_AT_ONCE = 2048  # rows: enough to keep the tokenizer's threads busy

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PromptItem:
    index: int
    """Position in the data set."""
    text: str
    token_ids: TokenIds


@dataclass(frozen=True, slots=True)
class SequenceItem:
    index: int
    prompt_ids: TokenIds
    response_ids: TokenIds
    """Ends with EOS."""


@dataclass(frozen=True, slots=True)
class PreferenceItem:
    index: int
    prompt_ids: TokenIds
    chosen_ids: TokenIds
    """Ends with EOS, as does `rejected_ids`."""
    rejected_ids: TokenIds


ItemT = TypeVar("ItemT")


class Examples(Generic[ItemT]):
    """A data set in memory."""

    items: list[ItemT]
    digest: str
    """SHA-256 of every example's tokens, by which a run that goes on notices other data."""

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> ItemT:
        return self.items[index]


class PromptDataset(Examples[PromptItem]):
    """Prompts of a JSON-lines file with the field "prompt" (others are ignored), `.jsonl` or `.jsonl.gz`.

    `max_prompt_length` is in tokens, BOS included. Longer prompts are an error, or dropped and counted in the log.

    Raises:
        ConfigError: a defect of the file, by line and field; a prompt that is empty or too long; no prompt left.
    """

    def __init__(
        self, path: str | Path, tokenizer: Tokenizer, *, max_prompt_length: int, too_long: TooLong = "error"
    ) -> None:
        rows = _tokenised_rows(Path(path), tokenizer, (), "max_prompt_length", max_prompt_length, too_long)
        self.items = [PromptItem(index, text, prompt) for index, (text, prompt, _) in enumerate(rows)]
        self.digest = _digest(rows)


class SFTDataset(Examples[SequenceItem]):
    """Demonstrations with the fields "prompt" and "response".

    `max_sequence_length` is in tokens: BOS, prompt, response and EOS. Otherwise like `PromptDataset`.
    """

    def __init__(
        self, path: str | Path, tokenizer: Tokenizer, *, max_sequence_length: int, too_long: TooLong = "error"
    ) -> None:
        rows = _tokenised_rows(
            Path(path), tokenizer, ("response",), "max_sequence_length", max_sequence_length, too_long
        )
        self.items = [SequenceItem(index, prompt, response) for index, (_, prompt, [response]) in enumerate(rows)]
        self.digest = _digest(rows)


class PreferenceDataset(Examples[PreferenceItem]):
    """Preference pairs with the fields "prompt", "chosen" and "rejected"; the limit holds for the longer answer."""

    def __init__(
        self, path: str | Path, tokenizer: Tokenizer, *, max_sequence_length: int, too_long: TooLong = "error"
    ) -> None:
        rows = _tokenised_rows(
            Path(path), tokenizer, ("chosen", "rejected"), "max_sequence_length", max_sequence_length, too_long
        )
        self.items = [PreferenceItem(index, prompt, *responses) for index, (_, prompt, responses) in enumerate(rows)]
        self.digest = _digest(rows)


def _digest(rows: list[Row]) -> str:
    content = hashlib.sha256()
    for _, prompt, responses in rows:
        for ids in (prompt, *responses):
            content.update(len(ids).to_bytes(8, "little"))
            content.update(ids.astype("<i4").tobytes())
    return content.hexdigest()


def _tokenised_rows(
    path: Path, tokenizer: Tokenizer, responses: tuple[str, ...], limit_name: str, limit: int, too_long: TooLong
) -> list[Row]:
    """`(prompt text, prompt ids, ids of each field in responses)` of every row within the limit."""
    lines = list(read_jsonl(path, ("prompt", *responses)))
    rows = []
    for start in range(0, len(lines), _TOKENISED_AT_ONCE):
        chunk = lines[start : start + _TOKENISED_AT_ONCE]
        for (line, texts), (prompt, *answers) in zip(chunk, _encode(path, chunk, tokenizer), strict=True):
            if not prompt:
                raise ConfigError(f"{path}:{line}: field 'prompt' is empty: a response must follow at least one token")
            length = len(prompt) + max(map(len, answers), default=0)
            if length <= limit:
                ids = [np.array(tokens, dtype=np.int32) for tokens in (prompt, *answers)]
                rows.append((texts[0], ids[0], ids[1:]))
            elif too_long == "error":
                parts = zip(("prompt", *responses), (prompt, *answers), strict=True)
                sizes = ", ".join(f"'{field}' {len(tokens)}" for field, tokens in parts)
                raise ConfigError(
                    f"{path}:{line}: {length} tokens (field {sizes}), but {limit_name} = {limit}; "
                    "shorten it, raise the limit, or set too_long to 'drop'"
                )
    if not lines:
        raise ConfigError(f"{path}: no examples")
    if not rows:
        raise ConfigError(f"{path}: all {len(lines)} examples are longer than {limit_name} = {limit} tokens")
    if dropped := len(lines) - len(rows):
        logger.warning("%s: dropped %d of %d examples over %s = %d", path, dropped, len(lines), limit_name, limit)
    return rows


def _encode(path: Path, rows: list[tuple[int, tuple[str, ...]]], tokenizer: Tokenizer) -> list[tuple[list[int], ...]]:
    """Ids of prompt and responses of each `(line, (prompt, *responses))`, encoded together for speed."""
    prompts, *responses = zip(*(texts for _, texts in rows), strict=True)
    try:
        return list(zip(tokenizer.encode_prompts(prompts), *map(tokenizer.encode_responses, responses), strict=True))
    except ConfigError as error:
        if len(rows) > 1:  # one by one, to name the line
            return [encoded for row in rows for encoded in _encode(path, [row], tokenizer)]
        raise ConfigError(f"{path}:{rows[0][0]}: {error}") from None


def collate(
    sequences: Sequence[tuple[Sequence[int] | TokenIds, Sequence[int] | TokenIds]], pad_id: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Lay `(prompt_ids, response_ids)` pairs out as one right-padded batch.

    Returns:
        tokens [B, S] int64, with S the longest sequence; prompt_lengths [B] int64;
        lengths [B] int64, prompt and response together.
    """
    prompt_lengths = torch.tensor([len(prompt) for prompt, _ in sequences])
    lengths = torch.tensor([len(prompt) + len(response) for prompt, response in sequences])
    tokens = torch.full((len(sequences), int(lengths.max())), pad_id, dtype=torch.int64)
    for row, (prompt, response) in zip(tokens, sequences, strict=True):
        row[: len(prompt)] = torch.as_tensor(prompt)
        row[len(prompt) : len(prompt) + len(response)] = torch.as_tensor(response)
    return tokens, prompt_lengths, lengths


class GlobalBatches(Iterator[list[int]]):
    """Endless global batches of data-set indices; their order depends on seed and epoch, never on the layout of ranks.

    Each epoch visits every index at most once; what is left of it that does not fill a batch is skipped.

    Args:
        digest: of the data set that the indices are of.
    """

    def __init__(self, num_items: int, batch_size: int, *, seed: int, digest: str) -> None:
        self.epoch: int
        self._position: int
        self._order: npt.NDArray[np.int64]
        if num_items < 1 or batch_size < 1:
            raise ConfigError(f"num_items = {num_items}, batch_size = {batch_size}: expected at least 1 of each")
        if num_items < batch_size:
            raise ConfigError(f"the data set has {num_items} examples, fewer than one global batch of {batch_size}")
        self._num_items, self._batch_size, self._seed = num_items, batch_size, seed
        self._settings: dict[str, int | str]
        self._settings = {"num_items": num_items, "batch_size": batch_size, "seed": seed, "digest": digest}
        self._start_epoch(0)

    def __next__(self) -> list[int]:
        if self._position + self._batch_size > self._num_items:
            self._start_epoch(self.epoch + 1)
        batch = self._order[self._position : self._position + self._batch_size]
        self._position += self._batch_size
        return batch.tolist()

    def state_dict(self) -> dict[str, int | str]:
        return {"epoch": self.epoch, "position": self._position, **self._settings}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue exactly where `state` was taken.

        Raises:
            ConfigError: the state belongs to another data set, batch size or seed.
        """
        for name, value in self._settings.items():
            if state[name] != value:
                what = "the digest of the training data" if name == "digest" else name
                raise ConfigError(f"cannot resume the data order: {what} was {state[name]}, and is now {value}")
        self._start_epoch(state["epoch"])
        self._position = state["position"]

    def _start_epoch(self, epoch: int) -> None:
        self.epoch, self._position = epoch, 0
        self._order = np.arange(self._num_items)
        np.random.default_rng([self._seed, epoch]).shuffle(self._order)
