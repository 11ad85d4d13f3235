"""Turns corpora into the files that training reads: read, check, drop duplicates, format, drop long rows, split, write.

Rows are streamed (twice, if a tokenizer is to be trained), so a corpus may be larger than memory, unless it is a JSON
array. Only digests of the rows are kept in memory, to recognise duplicates: some 200 bytes for each prompt, 300 for
each pair.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any, Literal

from nemo_eppo.config import ConfigError
from nemo_eppo.data.tokenizer import EOS, Tokenizer, encode_in_blocks, train_bpe
from nemo_eppo.files import directory_made_whole, json_line
from nemo_eppo.settings.preparation import PreparationConfig
from nemo_eppo.tools.corpora import Corpus, Example, Fields, Malformed
from nemo_eppo.tools.sources import HubDataset, Row, read_rows

SPLITS = ("train", "validation")
DUPLICATE = "duplicate"

_NOTHING = Example("", (), (), "")


@dataclass(frozen=True, slots=True)
class Entry:
    """One example, and the line of the file that it came from."""

    file: str
    line: int
    example: Example
    defect: str = ""
    """Reason for dropping it; empty if it is kept."""
    carried: Mapping[str, Any] = field(default_factory=dict)
    """Fields of its row that go into the prompts files, see `PreparationConfig.keep`."""


@dataclass
class PreparationCounts:
    """Numbers of examples read and dropped, and of rows written; `str()` gives the lines to print."""

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
    settings: PreparationConfig,
    *,
    progress: bool = False,
) -> PreparationCounts:
    """Write `tokenizer/`, `{preferences,sft,prompts}.{train,validation}.jsonl` and `dropped.jsonl` into `out_dir`.

    Pairs give rows of all three kinds (for SFT with the chosen response), demonstrations give SFT rows and prompts,
    prompts only prompts; no row is written twice. Malformed and unusable rows, duplicates, examples over the limits and
    examples that a given tokenizer cannot encode are dropped. `dropped.jsonl` lists each with its file, line and
    reason.

    Raises:
        ConfigError: a source, template or tokenizer cannot be read, a usable row lacks a field of `settings.keep`, a
            row is defective and `settings.strict` is set, or a split is empty.
    """
    tokenizer = _tokenizer(settings)

    def entries() -> Iterator[Entry]:
        read = _read(corpus, sources, tokenizer.eos_text if tokenizer else EOS, settings.keep, progress)
        for entry in _mark_duplicates(read):
            if not entry.defect:
                entry = _format(entry, tokenizer if settings.chat_template else None, settings.system_prompt)
            if settings.strict and entry.defect not in ("", DUPLICATE):
                raise ConfigError(f"{entry.file}:{entry.line}: {entry.defect}")
            yield entry

    with directory_made_whole(out_dir) as directory:
        if tokenizer:
            tokenizer.save(directory / "tokenizer")
        else:
            texts = _training_texts(entries(), settings.validation_fraction)
            train_bpe(texts, settings.vocab_size, directory / "tokenizer")
        checked = entries()
        limits = settings.max_prompt_tokens, settings.max_response_tokens
        if tokenizer or any(limits):
            checked = _mark_too_long(checked, tokenizer or Tokenizer.from_directory(directory / "tokenizer"), *limits)
        counts = _write(checked, directory, settings.validation_fraction)
        _require_all_files(counts, sources, settings.validation_fraction)
    return counts


def _require_all_files(
    counts: PreparationCounts, sources: Sequence[Path | HubDataset], validation_fraction: float
) -> None:
    """Raise ConfigError if a file of one of the kinds has no rows."""
    kinds = {name.partition(".")[0] for name in counts.written} or {"prompts"}
    for name in (f"{kind}.{split}.jsonl" for kind in sorted(kinds) for split in SPLITS):
        if not counts.written[name]:
            dropped = replace(counts, written=Counter())  # the written files are removed with the directory
            where = f"{sources[0]}{' and others' if len(sources) > 1 else ''}"
            raise ConfigError(
                f"nothing is left for {name} of {where} (validation_fraction = {validation_fraction})\n{dropped}"
            )


def _tokenizer(settings: PreparationConfig) -> Tokenizer | None:
    """Load the tokenizer with its template, if one is given; ConfigError if one of them cannot be used."""
    from jinja2 import TemplateError, TemplateSyntaxError

    tokenizer = None if settings.tokenizer is None else Tokenizer.from_directory(settings.tokenizer)
    template = settings.chat_template
    if template is None:
        return tokenizer
    if tokenizer is None:
        raise ConfigError("a chat template needs a tokenizer: it spells that tokenizer's special tokens")
    if isinstance(template, Path):
        if not template.is_file():
            problem = "a directory, expected a file" if template.is_dir() else "no such file"
            raise ConfigError(f"{template}: {problem}")
        tokenizer.chat_template = template.read_text(encoding="utf-8")
    elif tokenizer.chat_template is None:
        raise ConfigError("chat_template = 'tokenizer': the tokenizer has no chat template of its own; give a file")
    try:
        tokenizer.render_chat([{"role": "user", "content": "x"}], add_generation_prompt=True)
    except TemplateSyntaxError as error:
        raise ConfigError(f"chat template '{template}', line {error.lineno}: {error.message}") from None
    except TemplateError:
        pass  # a template that refuses this conversation may accept those of the corpus
    return tokenizer


def _read(
    corpus: Corpus, sources: Sequence[Path | HubDataset], eos_text: str, keep: Sequence[str], progress: bool
) -> Iterator[Entry]:
    for source in sources:
        rows = (replace(row, fields=_present(row.fields)) for row in read_rows(source, progress))
        for row in corpus.join(rows):
            if row.defect:
                yield Entry(row.file, row.line, _NOTHING, row.defect)
                continue
            try:
                for example in corpus.read(row.fields):
                    example = replace(example, responses=tuple(_without_eos(r, eos_text) for r in example.responses))
                    defect = _defect(example, eos_text)
                    yield Entry(row.file, row.line, example, defect, {} if defect else _carried(row, keep))
            except Malformed as error:
                yield Entry(row.file, row.line, _NOTHING, str(error))


def _carried(row: Row, keep: Sequence[str]) -> dict[str, Any]:
    """Return the fields to keep of a row; ConfigError if one is missing or cannot be written."""
    where = f"{row.file}:{row.line}"
    for name in keep:
        if name not in row.fields:
            raise ConfigError(
                f"{where}: field '{name}' is missing, which is to be kept (found: {', '.join(row.fields)})"
            )
        try:
            json_line({name: row.fields[name]}).encode()
        except (TypeError, UnicodeEncodeError) as error:  # dates and bytes of a table; a lone surrogate
            raise ConfigError(f"{where}: field '{name}' cannot be kept: {error}") from None
    return {name: row.fields[name] for name in keep}


def _present(fields: Fields) -> Fields:
    """Leave out null fields: tables fill absent fields with null."""
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


def _mark_duplicates(entries: Iterable[Entry]) -> Iterator[Entry]:
    seen: set[bytes] = set()
    for entry in entries:
        if not entry.defect:
            digest = _digest(entry.example.prompt, *entry.example.responses, json_line(entry.carried))
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
        chats = [
            chat_tokenizer.render_chat([*turns, {"role": "assistant", "content": response.strip()}], False)
            for response in example.responses
        ]
    except TemplateError as error:
        return replace(entry, defect=f"the chat template refuses it: {error}")
    if not all(text.startswith(prompt) for text in chats):
        return replace(entry, defect="the chat template writes another prompt once there is a response")
    # the response includes the text that closes the assistant's turn, but not EOS, which the tokenizer adds
    responses = tuple(text.removeprefix(prompt).partition(chat_tokenizer.eos_text)[0] for text in chats)
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
    written: set[bytes] = set()  # digests of SFT rows and prompts, which several pairs may give
    files: dict[str, IO[str]] = {}
    with ExitStack() as stack:

        def write(name: str, row: Mapping[str, Any]) -> None:
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
            for kind, row in _rows(entry).items():
                if kind != "preferences":
                    digest = _digest(kind, json_line(row))
                    if digest in written:
                        continue
                    written.add(digest)
                write(f"{kind}.{split}.jsonl", row)
                counts.written[f"{kind}.{split}.jsonl"] += 1
    return counts


def _rows(entry: Entry) -> dict[str, dict[str, Any]]:
    """Return the rows that an example gives, by kind."""
    prompt, responses = entry.example.prompt, entry.example.responses
    rows = {}
    if len(responses) == 2:
        rows["preferences"] = {"prompt": prompt, "chosen": responses[0], "rejected": responses[1]}
    if responses:
        rows["sft"] = {"prompt": prompt, "response": responses[0]}
    rows["prompts"] = {"prompt": prompt, **entry.carried}
    return rows


def _digest(*texts: str) -> bytes:
    return hashlib.sha256("\0".join(texts).encode()).digest()[:16]


def _split(example: Example, validation_fraction: float) -> Literal["train", "validation"]:
    fraction = int.from_bytes(hashlib.sha256(example.opening.encode()).digest()[:8], "big") / 2**64
    return "validation" if fraction < validation_fraction else "train"
