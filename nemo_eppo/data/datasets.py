"""Prompt, SFT and preference data sets, tokenised when loaded, and the order in which training reads them."""

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from nemo_eppo.config import ConfigError
from nemo_eppo.data.jsonl import read_objects, text_fields
from nemo_eppo.data.tokenizer import Tokenizer, encode_in_blocks

TokenIds = npt.NDArray[np.int32]
TooLong = Literal["error", "drop"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PromptItem:
    """One prompt, and the other fields of its row."""

    index: int
    """Position in the data set."""
    text: str
    token_ids: TokenIds
    json_fields: bytes = b"{}"
    """The row's other fields as JSON, which takes a fraction of the memory of the objects."""

    @property
    def fields(self) -> dict[str, Any]:
        """The row's other fields, such as "reference_answer"; every access gives a new copy."""
        fields: dict[str, Any] = json.loads(self.json_fields)
        return fields


@dataclass(frozen=True, slots=True)
class SequenceItem:
    """One demonstration: a prompt and a response to learn."""

    index: int
    prompt_ids: TokenIds
    response_ids: TokenIds
    """Ends with EOS."""


@dataclass(frozen=True, slots=True)
class PreferenceItem:
    """One pair of responses to a prompt."""

    index: int
    prompt_ids: TokenIds
    chosen_ids: TokenIds
    """Ends with EOS, as does `rejected_ids`."""
    rejected_ids: TokenIds


ItemT = TypeVar("ItemT")


class Examples(Generic[ItemT]):
    """A data set in memory.

    Args:
        rows: every row with the token ids of its prompt and of each response.
        make_item: makes an item from its position, its row and these ids.
    """

    items: list[ItemT]
    digest: str
    """SHA-256 of all examples' tokens, by which a resumed run notices other data."""

    def __init__(self, rows: Iterable[tuple[dict[str, Any], list[TokenIds]]], make_item: Callable[..., ItemT]) -> None:
        self.items = []
        content = hashlib.sha256()
        for row, ids in rows:
            for part in ids:
                content.update(len(part).to_bytes(8, "little"))
                content.update(part.astype("<i4").tobytes())
            self.items.append(make_item(len(self.items), row, *ids))
        self.digest = content.hexdigest()

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> ItemT:
        return self.items[index]


class PromptDataset(Examples[PromptItem]):
    """Prompts of a JSON-lines file with the field "prompt", `.jsonl` or `.jsonl.gz`; other fields are kept.

    `max_prompt_length` is in tokens, BOS included. Longer prompts are an error, or dropped and counted in the log.

    Raises:
        ConfigError: the file has a defect (named by line and field), a prompt is empty or too long, or none is left.
    """

    def __init__(
        self, path: str | Path, tokenizer: Tokenizer, *, max_prompt_length: int, too_long: TooLong = "error"
    ) -> None:
        rows = tokenised_rows(Path(path), tokenizer, (), "max_prompt_length", max_prompt_length, too_long)
        super().__init__(rows, _prompt_item)


class SFTDataset(Examples[SequenceItem]):
    """Demonstrations with the fields "prompt" and "response".

    `max_sequence_length` is in tokens: BOS, prompt, response and EOS. A response without text, whitespace alone
    included, is an error. Otherwise like `PromptDataset`.
    """

    def __init__(
        self, path: str | Path, tokenizer: Tokenizer, *, max_sequence_length: int, too_long: TooLong = "error"
    ) -> None:
        fields = ("response",)
        rows = tokenised_rows(Path(path), tokenizer, fields, "max_sequence_length", max_sequence_length, too_long)
        super().__init__(rows, lambda index, row, *ids: SequenceItem(index, *ids))


class PreferenceDataset(Examples[PreferenceItem]):
    """Preference pairs with the fields "prompt", "chosen" and "rejected". The limit holds for the longer response. One
    of the responses may be empty."""

    def __init__(
        self, path: str | Path, tokenizer: Tokenizer, *, max_sequence_length: int, too_long: TooLong = "error"
    ) -> None:
        fields = ("chosen", "rejected")
        rows = tokenised_rows(Path(path), tokenizer, fields, "max_sequence_length", max_sequence_length, too_long)
        super().__init__(rows, lambda index, row, *ids: PreferenceItem(index, *ids))


def _prompt_item(index: int, row: dict[str, Any], token_ids: TokenIds) -> PromptItem:
    others = {name: value for name, value in row.items() if name != "prompt"}
    json_fields = (json.dumps(others, ensure_ascii=False).encode(),) if others else ()  # else the shared default
    return PromptItem(index, row["prompt"], token_ids, *json_fields)


def tokenised_rows(
    path: Path, tokenizer: Tokenizer, responses: tuple[str, ...], limit_name: str, limit: int, too_long: TooLong
) -> Iterator[tuple[dict[str, Any], list[TokenIds]]]:
    """Yield every row within the limit, with the token ids of its prompt and of each field in `responses`."""
    fields = ("prompt", *responses)

    def encode(block: list[tuple[int, dict[str, Any], tuple[str, ...]]]) -> list[tuple[list[int], ...]]:
        prompts, *answers = zip(*(texts for _, _, texts in block), strict=True)
        return list(zip(tokenizer.encode_prompts(prompts), *map(tokenizer.encode_responses, answers), strict=True))

    rows = ((line, row, text_fields(row, fields, f"{path}:{line}")) for line, row in read_objects(path))
    read = kept = 0
    for (line, row, _), encoded in encode_in_blocks(rows, encode):
        read += 1
        if isinstance(encoded, ConfigError):
            raise ConfigError(f"{path}:{line}: {encoded}")
        prompt, *answers = encoded
        if not prompt:
            raise ConfigError(f"{path}:{line}: field 'prompt' is empty: a response must follow at least one token")
        # one side of a pair may be empty: whether an empty answer is better can be learnt
        if responses and not any(row[field].removesuffix(tokenizer.eos_text).strip() for field in responses):
            names = ", ".join(f"'{field}'" for field in responses)
            raise ConfigError(f"{path}:{line}: field {names} is empty: there is no text to learn")
        if len(answers) > 1 and answers[0] == answers[1]:
            raise ConfigError(f"{path}:{line}: fields 'chosen' and 'rejected' are equal: neither can be preferred")
        length = len(prompt) + max(map(len, answers), default=0)
        if length <= limit:
            kept += 1
            yield row, [np.array(tokens, dtype=np.int32) for tokens in encoded]
        elif too_long == "error":
            sizes = ", ".join(f"'{field}' {len(tokens)}" for field, tokens in zip(fields, encoded, strict=True))
            raise ConfigError(
                f"{path}:{line}: {length} tokens (field {sizes}), but {limit_name} = {limit}; "
                "shorten it, raise the limit, or set data.too_long to 'drop'"
            )
    if not read:
        raise ConfigError(f"{path}: no examples")
    if not kept:
        raise ConfigError(f"{path}: all {read} examples are longer than {limit_name} = {limit} tokens")
    if kept < read:
        logger.warning("%s: dropped %d of %d examples over %s = %d", path, read - kept, read, limit_name, limit)


def collate(
    sequences: Sequence[tuple[Sequence[int] | TokenIds, Sequence[int] | TokenIds]], pad_id: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Put `(prompt_ids, response_ids)` pairs into one batch, padded on the right.

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
    """Endless global batches of data-set indices; their order depends on seed and epoch, not on the layout of ranks.

    Each epoch gives every index at most once; the last indices, if they do not fill a batch, are skipped.

    Args:
        digest: `digest` of the data set, for `load_state_dict`.
    """

    def __init__(self, num_items: int, batch_size: int, *, seed: int, digest: str) -> None:
        self.epoch: int
        self._position: int
        self._order: npt.NDArray[np.int64]
        if num_items < 1 or batch_size < 1:
            raise ConfigError(f"num_items = {num_items}, batch_size = {batch_size}: expected at least 1 of each")
        if num_items < batch_size:
            raise ConfigError(
                f"the data set has {num_items} examples, fewer than one global batch of {batch_size}: expected more "
                "data, or a smaller fit.global_batch_size (of the actor: ppo.rollout_batch_size)"
            )
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
        """Resume exactly after the batches that had been given when `state` was taken.

        Raises:
            ConfigError: the state belongs to another data set, batch size or seed.
        """
        for name, value in self._settings.items():
            if state[name] != value:
                label = {"digest": "the digest of its rows", "num_items": "its num_items"}.get(name, name)
                raise ConfigError(
                    f"cannot resume the order of data.train: {label} was {state[name]}, and is now {value}; set it "
                    "back, or choose another run directory"
                )
        self._start_epoch(state["epoch"])
        self._position = state["position"]

    def _start_epoch(self, epoch: int) -> None:
        self.epoch, self._position = epoch, 0
        self._order = np.arange(self._num_items)
        np.random.default_rng([self._seed, epoch]).shuffle(self._order)
