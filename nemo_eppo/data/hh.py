"""Prepare Anthropic HH dialogues ({"chosen", "rejected"} per line) as preference, SFT and prompt data.

A prompt is a dialogue up to and including its last "\\n\\nAssistant:"; a response is what follows, its leading space
included. Files are streamed (twice, if a tokenizer is to be trained), so a corpus may be larger than memory.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

from nemo_eppo.config import ConfigError
from nemo_eppo.data.jsonl import json_line, output_directory, read_jsonl
from nemo_eppo.data.tokenizer import Tokenizer, train_bpe

ASSISTANT = "\n\nAssistant:"

_TOKENISED_AT_ONCE = 2048  # rows: enough to keep the tokenizer's threads busy


@dataclass(frozen=True, slots=True)
class Pair:
    """One line of a corpus, split."""

    path: Path
    line: int
    prompt: str
    chosen: str
    rejected: str
    defect: str
    """Why the pair cannot be used; empty if it can."""


@dataclass
class PreparationCounts:
    """What was read, dropped and written; `str()` gives the lines to print."""

    read: int = 0
    written: Counter[str] = field(default_factory=Counter)
    """Rows by file name."""
    dropped: Counter[str] = field(default_factory=Counter)
    """Rows by reason."""
    first_dropped: dict[str, str] = field(default_factory=dict)
    """The first row of each reason, as file:line."""

    def __str__(self) -> str:
        lines = [f"read    {self.read:8} rows"]
        for reason, count in self.dropped.most_common():
            lines.append(f"dropped {count:8} {reason} (first: {self.first_dropped[reason]})")
        for name, count in self.written.items():
            lines.append(f"wrote   {count:8} {name}")
        return "\n".join(lines)


def split_pair(chosen: str, rejected: str) -> tuple[str, str, str, str]:
    """`(prompt, chosen response, rejected response, defect)` of two dialogues; a usable pair's defect is empty."""
    prompt, marker, chosen_response = chosen.rpartition(ASSISTANT)
    rejected_prompt, rejected_marker, rejected_response = rejected.rpartition(ASSISTANT)
    defect = ""
    if not (marker and rejected_marker):
        defect = "no assistant turn"
    elif prompt != rejected_prompt:
        defect = "prompts differ"
    elif not chosen_response.strip():
        defect = "empty chosen response"
    elif not rejected_response.strip():
        defect = "empty rejected response"
    elif chosen_response == rejected_response:
        defect = "chosen equals rejected"
    return prompt + marker, chosen_response, rejected_response, defect


def prepare_hh(
    inputs: Sequence[Path],
    out_dir: Path,
    *,
    validation_fraction: float = 0.05,
    tokenizer_dir: Path | None = None,
    bpe_vocab_size: int = 8192,
    max_prompt_tokens: int | None = None,
    max_response_tokens: int | None = None,
    strict: bool = False,
    progress: bool = False,
) -> PreparationCounts:
    """Write `tokenizer/`, `{preferences,sft,prompts}.{train,validation}.jsonl` and `dropped.jsonl` into `out_dir`.

    A prompt's hash decides its split, so no prompt is in both, whatever the order or number of the inputs. SFT rows
    are prompt and chosen response; `prompts` holds each prompt once. Without `tokenizer_dir`, a byte-level BPE of
    `bpe_vocab_size` is trained on the training rows. Pairs beyond the limits (in tokens, BOS and EOS included; of the
    longer response) are dropped, and so are unusable ones unless `strict`; `dropped.jsonl` lists file, line and reason.

    Raises:
        ConfigError: unreadable input, by file, line and field; an unusable pair if `strict`; an empty split.
    """
    if not 0 < validation_fraction < 1:
        raise ConfigError(f"validation_fraction = {validation_fraction}: expected a number between 0 and 1")
    for name, limit in (("max_prompt_tokens", max_prompt_tokens), ("max_response_tokens", max_response_tokens)):
        if limit is not None and limit < 1:
            raise ConfigError(f"{name} = {limit}: expected at least 1")

    with output_directory(out_dir) as directory:
        if tokenizer_dir is None:
            texts = _training_texts(_read_pairs(inputs, strict, progress), validation_fraction)
            train_bpe(texts, bpe_vocab_size, directory / "tokenizer")
        else:
            Tokenizer.from_directory(tokenizer_dir).save(directory / "tokenizer")
        pairs = _read_pairs(inputs, strict, progress)
        if max_prompt_tokens is not None or max_response_tokens is not None:
            tokenizer = Tokenizer.from_directory(directory / "tokenizer")
            pairs = _mark_too_long(pairs, tokenizer, max_prompt_tokens, max_response_tokens)
        counts = _write(pairs, directory, validation_fraction)
        for split in ("train", "validation"):
            if not counts.written[f"preferences.{split}.jsonl"]:
                raise ConfigError(
                    f"no pair is left for {split} (validation_fraction = {validation_fraction})\n{counts}"
                )
    return counts


def _read_pairs(inputs: Sequence[Path], strict: bool, progress: bool) -> Iterator[Pair]:
    for path in inputs:
        for line, (chosen, rejected) in read_jsonl(path, ("chosen", "rejected"), progress):
            pair = Pair(path, line, *split_pair(chosen, rejected))
            if strict and pair.defect:
                raise ConfigError(f"{path}:{line}: {pair.defect}")
            yield pair


def _training_texts(pairs: Iterable[Pair], validation_fraction: float) -> Iterator[str]:
    for pair in pairs:
        if not pair.defect and not _is_validation(_hash(pair.prompt), validation_fraction):
            yield from (pair.prompt, pair.chosen, pair.rejected)


def _mark_too_long(
    pairs: Iterator[Pair], tokenizer: Tokenizer, max_prompt_tokens: int | None, max_response_tokens: int | None
) -> Iterator[Pair]:
    while chunk := list(islice(pairs, _TOKENISED_AT_ONCE)):
        try:
            prompts = tokenizer.encode_prompts([pair.prompt for pair in chunk])
            chosen = tokenizer.encode_responses([pair.chosen for pair in chunk])
            rejected = tokenizer.encode_responses([pair.rejected for pair in chunk])
        except ConfigError as error:
            first, last = chunk[0], chunk[-1]
            raise ConfigError(f"between {first.path}:{first.line} and {last.path}:{last.line}: {error}") from None
        for pair, prompt, *responses in zip(chunk, prompts, chosen, rejected, strict=True):
            if pair.defect:
                yield pair
            elif max_prompt_tokens is not None and len(prompt) > max_prompt_tokens:
                yield replace(pair, defect=f"prompt longer than {max_prompt_tokens} tokens")
            elif max_response_tokens is not None and max(map(len, responses)) > max_response_tokens:
                yield replace(pair, defect=f"response longer than {max_response_tokens} tokens")
            else:
                yield pair


def _write(pairs: Iterable[Pair], directory: Path, validation_fraction: float) -> PreparationCounts:
    counts = PreparationCounts()
    seen_prompts: set[bytes] = set()
    names = [f"{kind}.{split}.jsonl" for kind in ("preferences", "sft", "prompts") for split in ("train", "validation")]
    with ExitStack() as stack:
        files = {
            name: stack.enter_context((directory / name).open("w", encoding="utf-8"))
            for name in ("dropped.jsonl", *names)
        }
        for pair in pairs:
            counts.read += 1
            if pair.defect:
                counts.dropped[pair.defect] += 1
                counts.first_dropped.setdefault(pair.defect, f"{pair.path}:{pair.line}")
                report: dict[str, str | int] = {"file": str(pair.path), "line": pair.line, "reason": pair.defect}
                files["dropped.jsonl"].write(json_line(report))
                continue
            prompt_hash = _hash(pair.prompt)
            split = "validation" if _is_validation(prompt_hash, validation_fraction) else "train"
            rows = {
                "preferences": {"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected},
                "sft": {"prompt": pair.prompt, "response": pair.chosen},
            }
            if prompt_hash not in seen_prompts:
                seen_prompts.add(prompt_hash)
                rows["prompts"] = {"prompt": pair.prompt}
            for kind, texts in rows.items():
                files[f"{kind}.{split}.jsonl"].write(json_line(texts))
                counts.written[f"{kind}.{split}.jsonl"] += 1
    return counts


def _hash(prompt: str) -> bytes:
    return hashlib.sha256(prompt.encode()).digest()


def _is_validation(prompt_hash: bytes, validation_fraction: float) -> bool:
    return int.from_bytes(prompt_hash[:8], "big") < validation_fraction * 2**64
