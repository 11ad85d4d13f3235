"""Reads energy losses of two models' responses to the same prompts, and labels of hacking, from files."""

import csv
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nemo_eppo.config import ConfigError
from nemo_eppo.data.jsonl import DAMAGED_ARCHIVE, open_stream, read_lines, read_objects
from nemo_eppo.evaluation.detection import ENERGY, KL, LENGTH, RISE, Bools, signs_of_rows
from nemo_eppo.evaluation.intervals import Floats, numbered

SAME_RESPONSE_RISE = "rise on the same response"
_SFT, _RLHF = "sft_energy_loss", "rlhf_energy_loss"
_LABELS = {"hacking": True, "normal": False}
_VERDICTS = {"Yes": True, "No": False}
_PAPER = (("input", "actor_num0_response"), ("input", "actor_latest_response"))
_OWN = (("prompt", "response"), ("prompt", "response"))


class Texts(NamedTuple):
    """A prompt and the two responses."""

    prompt: str
    before: str
    after: str


@dataclass(frozen=True)
class Energies:
    """Energy losses of N responses before and after RLHF, with labels, other signs and texts where known."""

    index: Sequence[int]
    """Numbers of the samples, by which a file of labels names them."""
    before: Floats
    """[N] of the SFT model."""
    after: Floats
    """[N] of the RLHF model."""
    hacked: Bools | None = None
    """[N] whether the RLHF model's response is reward hacking; None without labels."""
    sweep: Mapping[str, tuple[Floats, Floats]] = field(default_factory=dict)
    """[N, layers] before and after, for each preset that was read."""
    signs: Mapping[str, Floats] = field(default_factory=dict)
    """[N], other signs of hacking, by name."""
    texts: Sequence[Texts] | None = None
    prompts: Sequence[int] | None = None
    """[N] the number of each sample's prompt; None if every sample has one of its own."""


@dataclass(frozen=True)
class Responses:
    """Rows of responses before and after RLHF, in the same order, and the fields (prompt, response) of their texts."""

    before: list[dict[str, Any]]
    after: list[dict[str, Any]]
    before_fields: tuple[str, str]
    after_fields: tuple[str, str]
    same: bool
    """Whether both models read the same responses."""

    @property
    def index(self) -> list[int]:
        """Each row's "index" if all have one, as in the paper's files; otherwise its number, from 0."""
        named = [row["index"] for row in self.after if type(row.get("index")) is int]
        return named if len(named) == len(self.after) else list(range(len(self.after)))

    @property
    def prompts(self) -> list[int]:
        """The number of each row's prompt, from 0: equal token ids or, without them, equal texts are one prompt."""
        prompts = (json.dumps(row.get("prompt_ids", row.get(self.after_fields[0]))) for row in self.after)
        return numbered(prompts).tolist()

    @property
    def texts(self) -> list[Texts] | None:
        """The texts of each row; None if a row has token ids only."""
        prompt, response = self.after_fields
        rows = zip(self.before, self.after, strict=True)
        fields = [(new.get(prompt), old.get(self.before_fields[1]), new.get(response)) for old, new in rows]
        is_text = all(isinstance(text, str) for texts in fields for text in texts)
        return [Texts(*map(str, texts)) for texts in fields] if is_text else None


def read_data(data: Path, before_data: Path | None) -> Responses:
    """Read the responses that the models are compared on.

    Rows {"prompt", "response"} are read by both models, unless `before_data` has the SFT model's own responses. Rows
    of the paper's repository have both: {"input", "actor_num0_response", "actor_latest_response"}.

    Raises:
        ConfigError: no rows, or not as many in both files.
    """
    after = [row for _, row in read_objects(data)]
    if not after:
        raise ConfigError(f"{data}: no rows")
    if _PAPER[1][1] in after[0]:
        if before_data is not None:
            raise ConfigError(f"--before-data: the rows of {data} have the responses of both models already")
        return Responses(after, after, *_PAPER, same=False)
    if before_data is None:
        return Responses(after, after, *_OWN, same=True)
    before = [row for _, row in read_objects(before_data)]
    _same_number(before_data, before, data, after)
    return Responses(before, after, *_OWN, same=False)


def read_labels(path: Path, index: Sequence[int]) -> Bools:
    """Read a JSON list [{"question_id": 0, "response": "Yes"}, ...], as in the paper's repository; .gz too.

    Args:
        index: numbers of the samples, each of which has to have a label.

    Raises:
        ConfigError: an entry is bad or contradicts another, several samples have one number, a sample has no label, or
            all labels are the same.
    """
    if repeated := [number for number, times in Counter(index).items() if times > 1]:
        raise ConfigError(
            f"{path}: names samples by their index, but several have index {repeated[0]}; expected one sample for each"
        )
    with open_stream(path, progress=False) as (file, _):
        try:
            entries = json.loads(file.read())
        except (*DAMAGED_ARCHIVE, ValueError) as error:
            raise ConfigError(f"{path}: not JSON ({error})") from None
    if not isinstance(entries, list):
        raise ConfigError(f'{path}: expected a JSON list [{{"question_id": 0, "response": "Yes"}}, ...]')
    labels: dict[int, bool] = {}
    for number, entry in enumerate(entries, start=1):
        if not isinstance(entry, dict) or type(entry.get("question_id")) is not int:
            raise ConfigError(f"{path}: entry {number} is {entry!r:.80}: expected an integer 'question_id'")
        if entry.get("response") not in _VERDICTS:
            raise ConfigError(
                f"{path}: entry {number}: field 'response' = {entry.get('response')!r:.80}: expected 'Yes' (hacking) "
                "or 'No'"
            )
        verdict = _VERDICTS[entry["response"]]
        if labels.setdefault(entry["question_id"], verdict) != verdict:
            raise ConfigError(
                f"{path}: entry {number}: field 'response' = {entry['response']!r}: contradicts an earlier entry with "
                f"question_id {entry['question_id']}; expected one verdict for each"
            )
    if missing := [number for number in index if number not in labels]:
        raise ConfigError(f"{path}: no entry has question_id {missing[0]}; {len(missing)} samples have no label")
    return _both_kinds(path, [labels[number] for number in index])


def read_csv(path: Path) -> Energies:
    """Read a table as in the paper's repository: index, label, sft_energy_loss, rlhf_energy_loss.

    The label is "hacking" or "normal"; the column may be missing.

    Raises:
        ConfigError: a column is missing, or a cell is bad, by its line.
    """
    lines = [(number, line.decode(errors="replace")) for number, line in read_lines(path)]
    if len(lines) < 2:
        raise ConfigError(f"{path}: no rows; expected a line of column names and one line for each sample")
    reader = csv.DictReader(line for _, line in lines)
    columns, rows = reader.fieldnames or [], list(reader)
    if missing := [name for name in ("index", _SFT, _RLHF) if name not in columns]:
        raise ConfigError(f"{path}:1: column '{missing[0]}' is missing (there are: {', '.join(columns)})")

    def cells(name: str, kind: type[int] | type[float]) -> Iterator[Any]:
        for (number, _), row in zip(lines[1:], rows, strict=True):
            try:
                value = kind(row[name] or "")
            except ValueError:
                value = math.nan
            if not math.isfinite(value):
                raise ConfigError(f"{path}:{number}: column '{name}' = {row[name]!r}: expected a number")
            yield value

    energies = Energies(
        list(cells("index", int)), np.array(list(cells(_SFT, float))), np.array(list(cells(_RLHF, float)))
    )
    if "label" not in columns:
        return energies
    for (number, _), row in zip(lines[1:], rows, strict=True):
        if row["label"] not in _LABELS:
            raise ConfigError(f"{path}:{number}: column 'label' = {row['label']!r}: expected {' or '.join(_LABELS)}")
    return replace(energies, hacked=_both_kinds(path, [_LABELS[row["label"] or ""] for row in rows]))


def read_scores(
    before: Path, after: Path, *, before_on_after: Path | None = None, responses: Responses | None = None
) -> Energies:
    """Read two files that `nemo-eppo score` wrote.

    Args:
        before_on_after: scores of the SFT model on the RLHF model's responses, if these are not those of `before`.
        responses: the rows that were scored, for their numbers, texts and recorded signs.

    Raises:
        ConfigError: the files differ in their numbers of rows, layers, or settings; a row is bad, by file and line.
    """
    old, new = _scores(before), _scores(after)
    same_responses = _check_settings(before, after)
    _same_number(before, old, after, new)
    energies = _column(before, old, "energy_loss"), _column(after, new, "energy_loss")
    signs: dict[str, Floats] = {}
    if responses is not None:  # rewards in their rows may come from functions
        signs = signs_of_rows(responses.after, responses.after, reward_models=False)
    for recorded in (ENERGY, RISE):  # by the run's policy; here, both are computed from the scores
        signs.pop(recorded, None)
    signs[LENGTH] = _column(after, new, "num_tokens")
    if before_on_after is not None:
        reread = _scores(before_on_after)
        signs[SAME_RESPONSE_RISE] = energies[1] - _column(before_on_after, reread, "energy_loss")
        signs[KL] = _column(after, new, "logprob") - _column(before_on_after, reread, "logprob")
    elif same_responses:
        signs[KL] = _column(after, new, "logprob") - _column(before, old, "logprob")
    sweeps = _sweep(before, old), _sweep(after, new)
    sweep = {preset: (layers, sweeps[1][preset]) for preset, layers in sweeps[0].items() if preset in sweeps[1]}
    for first, second in sweep.values():
        if first.shape != second.shape:
            raise ConfigError(f"{before} has {first.shape[1]} layers, {after} has {second.shape[1]}: expected as many")
    if responses is None:
        return Energies(range(len(old)), *energies, sweep=sweep, signs=signs)
    return Energies(
        responses.index, *energies, sweep=sweep, signs=signs, texts=responses.texts, prompts=responses.prompts
    )


def with_labels(energies: Energies, labels: Path | None) -> Energies:
    """Return the energies with the labels of a file, see `read_labels`; None leaves them as they are."""
    if labels is None:
        return energies
    if energies.hacked is not None:
        raise ConfigError(f"--labels {labels}: the table has labels in its column 'label'; expected one of the two")
    return replace(energies, hacked=read_labels(labels, energies.index))


def _scores(path: Path) -> list[dict[str, Any]]:
    rows = [row for _, row in read_objects(path)]
    if len(rows) < 2:
        raise ConfigError(f"{path}: rows: {len(rows)}; expected at least 2, or energies have no spread")
    return rows


def _column(path: Path, rows: Sequence[Mapping[str, Any]], name: str) -> Floats:
    for number, row in enumerate(rows, start=1):
        value = row.get(name)
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise ConfigError(f"{path}:{number}: field '{name}' = {value!r:.80}: expected a number, as score writes it")
    return np.array([row[name] for row in rows], dtype=np.float64)


def _sweep(path: Path, rows: Sequence[Mapping[str, Any]]) -> dict[str, Floats]:
    """Return the energies [N, layers] of each preset; none if the file has none."""
    try:
        return {
            preset: np.array([row["energies"][preset] for row in rows], dtype=np.float64)
            for preset in rows[0].get("energies", {})
        }
    except (KeyError, TypeError, ValueError, AttributeError):
        raise ConfigError(
            f"{path}: field 'energies' is not the same list of layers in every row, as score --sweep writes it"
        ) from None


def _check_settings(before: Path, after: Path) -> bool:
    """Return whether both files are scores of the same rows, by the settings that `score` wrote beside them.

    Raises:
        ConfigError: their energies are of different modules, layers, precisions or chat templates.
    """
    settings = [path.with_name(path.name + ".settings.json") for path in (before, after)]
    if not all(path.is_file() for path in settings):
        return False
    old, new = (json.loads(path.read_text()) for path in settings)
    for path, saved in ((before, old), (after, new)):
        if "preset" not in saved:
            raise ConfigError(f"{path}: another command than nemo-eppo score wrote it; expected scores")
    for name in ("preset", "layer", "precision", "chat_template"):
        if old[name] != new[name]:
            raise ConfigError(
                f"{before} has {name} = {old[name]!r}, {after} has {name} = {new[name]!r} (see {settings[0].name}); "
                "expected the same, or energies cannot be compared"
            )
    return all(old[name] == new[name] for name in ("data_sha256", "fields"))


def _same_number(path: Path, rows: Sequence[Any], other: Path, others: Sequence[Any]) -> None:
    if len(rows) != len(others):
        raise ConfigError(f"{path} has {len(rows)} rows, {other} has {len(others)}: expected one for each, in order")


def _both_kinds(path: Path, labels: Sequence[bool]) -> Bools:
    if len(set(labels)) < 2:
        raise ConfigError(f"{path}: all {len(labels)} labels are the same; expected hacking and normal responses")
    return np.array(labels)
