"""Turns corpora into the files that training reads: read, check, drop duplicates, format, drop long rows, split, write.

Rows are streamed (twice, if a tokenizer is to be trained), so a corpus may be larger than memory. Only digests of what
was written are kept, to recognise duplicates: some 200 bytes for each prompt, 300 for each pair.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Literal

from nemo_eppo.config import ConfigError
from nemo_eppo.data.jsonl import json_line
from nemo_eppo.data.tokenizer import EOS, Tokenizer, encode_in_blocks, train_bpe
from nemo_eppo.files import directory_made_whole
from nemo_eppo.tools.corpora import Corpus, Example, Fields, Malformed
from nemo_eppo.tools.sources import HubDataset, read_rows

SPLITS = ("train", "validation")
DUPLICATE = "duplicate"

_NOTHING = Example("", (), (), "")


@dataclass(frozen=True, slots=True)
class Entry:
    """One example, and the place in a file that it came from."""

    file: str
    line: int
    example: Example
    defect: str = ""
    """Why it is dropped; empty if it is kept."""


@dataclass
class PreparationCounts:
    """Counts what was read, dropped and written; `str()` gives the lines to print."""

    read: int = 0
    """Number of examples: pairs, demonstrations or prompts."""
    written: Counter[str] = field(default_factory=Counter)
    """Number of rows, by file name."""
    dropped: Counter[str] = field(default_factory=Counter)
    """Number of examples, by reason."""
    first_dropped: dict[str, str] = field(default_factory=dict)
    """The first example that was dropped for each reason, as file:line."""

    def __str__(self) -> str:
        lines = [f"read    {self.read:8} examples"]
        for reason, count in self.dropped.most_common():
            lines.append(f"dropped {count:8} {reason} (first: {self.first_dropped[reason]})")
        for name, count in self.written.items():
            lines.append(f"wrote   {count:8} {name}")
        return "\n".join(lines)


def prepare(
    corpus: Corpus,
    sources: Sequence[Path | HubDataset],
    out_dir: Path,
    *,
    validation_fraction: float = 0.05,
    tokenizer_dir: Path | None = None,
    bpe_vocab_size: int = 8192,
    chat_template: Path | Literal["tokenizer"] | None = None,
    system_prompt: str | None = None,
    max_prompt_tokens: int | None = None,
    max_response_tokens: int | None = None,
    strict: bool = False,
    progress: bool = False,
) -> PreparationCounts:
    """Write `tokenizer/`, `{preferences,sft,prompts}.{train,validation}.jsonl` and `dropped.jsonl` into `out_dir`.

    Pairs give rows of all three kinds (for SFT with the chosen response), demonstrations give SFT rows and prompts,
    prompts only prompts; no row is written twice. The hash of an example's opening decides its split, whatever the
    order or number of the sources. Without `tokenizer_dir`, a byte-level BPE of `bpe_vocab_size` is trained on the
    training rows.

    `chat_template` is the tokenizer's own or a Jinja file, which is then saved with the written tokenizer.
    `system_prompt` is for conversations that have none; without a template it goes in front of the text.

    Malformed and unusable rows are dropped, or are an error if `strict`. Duplicates, examples over the limits (in
    tokens, BOS and EOS included; for the longer response) and examples that a given tokenizer cannot encode are always
    dropped. `dropped.jsonl` lists each with its file, line and reason.

    Raises:
        ConfigError: a source, template or tokenizer cannot be read, a row is defective and `strict` is set, or a split
            is empty.
    """
    if not 0 < validation_fraction < 1:
        raise ConfigError(f"validation_fraction = {validation_fraction}: expected a number between 0 and 1")
    for name, limit in (("max_prompt_tokens", max_prompt_tokens), ("max_response_tokens", max_response_tokens)):
        if limit is not None and limit < 1:
            raise ConfigError(f"{name} = {limit}: expected at least 1")
    tokenizer = None if tokenizer_dir is None else Tokenizer.from_directory(tokenizer_dir)
    if chat_template is not None:
        _use_template(tokenizer, chat_template)

    def entries() -> Iterator[Entry]:
        found = _without_repetition(_read(corpus, sources, tokenizer.eos_text if tokenizer else EOS, progress))
        for entry in found:
            if not entry.defect:
                entry = _format(entry, tokenizer if chat_template else None, system_prompt)
            if strict and entry.defect not in ("", DUPLICATE):
                raise ConfigError(f"{entry.file}:{entry.line}: {entry.defect}")
            yield entry

    with directory_made_whole(out_dir) as directory:
        if tokenizer:
            tokenizer.save(directory / "tokenizer")
        else:
            train_bpe(_training_texts(entries(), validation_fraction), bpe_vocab_size, directory / "tokenizer")
        measured = entries()
        if tokenizer or max_prompt_tokens is not None or max_response_tokens is not None:
            tokenizer = tokenizer or Tokenizer.from_directory(directory / "tokenizer")
            measured = _mark_too_long(measured, tokenizer, max_prompt_tokens, max_response_tokens)
        counts = _write(measured, directory, validation_fraction)
        kinds = {name.partition(".")[0] for name in counts.written} or {"prompts"}
        for name in (f"{kind}.{split}.jsonl" for kind in sorted(kinds) for split in SPLITS):
            if not counts.written[name]:
                found = replace(counts, written=Counter())  # the files go with the directory
                where = f"{sources[0]}{' and others' if len(sources) > 1 else ''}"
                raise ConfigError(
                    f"nothing is left for {name} of {where} (validation_fraction = {validation_fraction})\n{found}"
                )
    return counts


def _use_template(tokenizer: Tokenizer | None, chat_template: Path | Literal["tokenizer"]) -> None:
    from jinja2 import TemplateError, TemplateSyntaxError

    if tokenizer is None:
        raise ConfigError("a chat template needs tokenizer_dir: it spells that tokenizer's special tokens")
    if isinstance(chat_template, Path):
        if not chat_template.is_file():
            found = "a directory, expected a file" if chat_template.is_dir() else "no such file"
            raise ConfigError(f"{chat_template}: {found}")
        tokenizer.chat_template = chat_template.read_text(encoding="utf-8")
    elif tokenizer.chat_template is None:
        raise ConfigError("chat_template = 'tokenizer': the tokenizer has no chat template of its own; give a file")
    try:
        tokenizer.render_chat([{"role": "user", "content": "x"}], add_generation_prompt=True)
    except TemplateSyntaxError as error:
        raise ConfigError(f"chat template '{chat_template}', line {error.lineno}: {error.message}") from None
    except TemplateError:
        pass  # it refuses this conversation, and may accept those of the corpus


def _read(corpus: Corpus, sources: Sequence[Path | HubDataset], eos_text: str, progress: bool) -> Iterator[Entry]:
    for source in sources:
        rows = (replace(row, fields=_present(row.fields)) for row in read_rows(source, progress))
        for row in corpus.join(rows):
            if row.defect:
                yield Entry(row.file, row.line, _NOTHING, row.defect)
                continue
            try:
                for example in corpus.read(row.fields):
                    example = replace(example, responses=tuple(_without_eos(r, eos_text) for r in example.responses))
                    yield Entry(row.file, row.line, example, _defect(example, eos_text))
            except Malformed as error:
                yield Entry(row.file, row.line, _NOTHING, str(error))


def _present(fields: Fields) -> Fields:
    """Leave out fields that are null, which stands in tables for fields that a row does not have."""
    return {name: value for name, value in fields.items() if value is not None}


def _without_eos(response: str, eos_text: str) -> str:
    """Remove EOS, which some corpora have as text at the end of a response: the tokenizer adds it."""
    stripped = response.rstrip()
    return stripped.removesuffix(eos_text) if stripped.endswith(eos_text) else response


def _defect(example: Example, eos_text: str) -> str:
    if not example.prompt.strip():
        return "empty prompt"
    names = ("chosen response", "rejected response") if len(example.responses) == 2 else ("response",)
    for name, response in zip(names, example.responses, strict=False):
        if not response.strip():
            return f"empty {name}"
        if eos_text in response:
            return f"{name} contains the end-of-sequence token"
    if len(example.responses) == 2 and example.responses[0] == example.responses[1]:
        return "chosen equals rejected"
    return ""


def _without_repetition(entries: Iterable[Entry]) -> Iterator[Entry]:
    seen: set[bytes] = set()
    for entry in entries:
        if not entry.defect:
            digest = _digest(entry.example.prompt, *entry.example.responses)
            if digest in seen:
                entry = replace(entry, defect=DUPLICATE)
            seen.add(digest)
        yield entry


def _format(entry: Entry, chat_tokenizer: Tokenizer | None, system_prompt: str | None) -> Entry:
    example = entry.example
    turns = example.turns
    needs_system = bool(system_prompt) and not (turns and turns[0]["role"] == "system")
    if chat_tokenizer is None:
        if not needs_system:
            return entry
        prompt = f"{system_prompt}\n\n{example.prompt.lstrip()}"
        return replace(entry, example=replace(example, prompt=prompt))
    if not turns:
        return replace(entry, defect="text that is already formatted takes no chat template")
    if needs_system:
        turns = ({"role": "system", "content": str(system_prompt)}, *turns)
    from jinja2 import TemplateError

    try:
        prompt = chat_tokenizer.render_chat(turns, add_generation_prompt=True)
        whole = [
            chat_tokenizer.render_chat([*turns, {"role": "assistant", "content": response.strip()}], False)
            for response in example.responses
        ]
    except TemplateError as error:
        return replace(entry, defect=f"the chat template refuses it: {error}")
    if not all(text.startswith(prompt) for text in whole):
        return replace(entry, defect="the chat template writes another prompt once there is a response")
    # What closes the assistant's turn is part of the response, up to EOS, which the tokenizer adds.
    responses = tuple(text.removeprefix(prompt).partition(chat_tokenizer.eos_text)[0] for text in whole)
    return replace(entry, example=replace(example, prompt=prompt, responses=responses))


def _training_texts(entries: Iterable[Entry], validation_fraction: float) -> Iterator[str]:
    for entry in entries:
        if not entry.defect and _split(entry.example, validation_fraction) == "train":
            yield from (entry.example.prompt, *entry.example.responses)


def _mark_too_long(
    entries: Iterator[Entry], tokenizer: Tokenizer, max_prompt_tokens: int | None, max_response_tokens: int | None
) -> Iterator[Entry]:
    def token_lengths(block: list[Entry]) -> list[tuple[int, int]]:
        """Return the lengths in tokens of prompt and longest response for each entry."""
        examples = [_NOTHING if entry.defect else entry.example for entry in block]
        prompts = tokenizer.encode_prompts([example.prompt for example in examples])
        responses = iter(tokenizer.encode_responses([text for example in examples for text in example.responses]))
        return [
            (len(prompt), max((len(next(responses)) for _ in example.responses), default=0))
            for prompt, example in zip(prompts, examples, strict=True)
        ]

    for entry, lengths in encode_in_blocks(entries, token_lengths):
        if entry.defect:
            yield entry
            continue
        defect = ""
        if isinstance(lengths, ConfigError):
            defect = "cannot be tokenised"
        elif lengths[0] == 0:
            defect = "empty prompt"
        elif max_prompt_tokens is not None and lengths[0] > max_prompt_tokens:
            defect = f"prompt longer than {max_prompt_tokens} tokens"
        elif max_response_tokens is not None and lengths[1] > max_response_tokens:
            defect = f"response longer than {max_response_tokens} tokens"
        yield replace(entry, defect=defect)


def _write(entries: Iterable[Entry], directory: Path, validation_fraction: float) -> PreparationCounts:
    counts = PreparationCounts()
    derived: set[bytes] = set()
    files: dict[str, IO[str]] = {}
    with ExitStack() as stack:

        def write(name: str, row: dict[str, str | int]) -> None:
            if name not in files:
                files[name] = stack.enter_context((directory / name).open("w", encoding="utf-8"))
            files[name].write(json_line(row))

        for entry in entries:
            counts.read += 1
            if entry.defect:
                counts.dropped[entry.defect] += 1
                counts.first_dropped.setdefault(entry.defect, f"{entry.file}:{entry.line}")
                write("dropped.jsonl", {"file": entry.file, "line": entry.line, "reason": entry.defect})
                continue
            split = _split(entry.example, validation_fraction)
            for kind, row in _rows(entry.example).items():
                if kind != "preferences":
                    digest = _digest(kind, *row.values())
                    if digest in derived:
                        continue
                    derived.add(digest)
                write(f"{kind}.{split}.jsonl", dict(row))
                counts.written[f"{kind}.{split}.jsonl"] += 1
    return counts


def _rows(example: Example) -> dict[str, dict[str, str]]:
    """Return the rows that an example gives, by kind."""
    rows = {}
    if len(example.responses) == 2:
        rows["preferences"] = dict(
            zip(("prompt", "chosen", "rejected"), (example.prompt, *example.responses), strict=True)
        )
    if example.responses:
        rows["sft"] = {"prompt": example.prompt, "response": example.responses[0]}
    rows["prompts"] = {"prompt": example.prompt}
    return rows


def _digest(*texts: str) -> bytes:
    return hashlib.sha256("\0".join(texts).encode()).digest()[:16]


def _split(example: Example, validation_fraction: float) -> Literal["train", "validation"]:
    fraction = int.from_bytes(hashlib.sha256(example.opening.encode()).digest()[:8], "big") / 2**64
    return "validation" if fraction < validation_fraction else "train"
