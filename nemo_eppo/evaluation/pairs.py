"""Pairs of responses to the same prompts, out of two files or one of the EPPO authors' format."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from nemo_eppo.config import ConfigError
from nemo_eppo.data.jsonl import read_objects, text_fields
from nemo_eppo.evaluation.responses import row_fields, row_finished, says_how_it_ended
from nemo_eppo.rewards.sample import Sample

_AUTHORS = ("input", "actor_num0_response", "actor_latest_response")  # prompt, SFT model's response, policy's


class Pair(NamedTuple):
    """Two responses to one prompt, as texts: without token ids."""

    response: Sample
    baseline: Sample


def read_pairs(path: Path, baseline: Path | None) -> list[Pair]:
    """Pair the responses of two files, or the two of each row of one file.

    Rows are {"prompt", "response"}; without `baseline` they are {"input", "actor_num0_response",
    "actor_latest_response"}, where the last is the response and the one before it the baseline. Where a file has
    several responses to a prompt, the first is paired with the other file's first, and so on. Responses are taken as
    finished if no row says how they ended.

    Args:
        path: .jsonl or .jsonl.gz, as `baseline`.

    Returns:
        pairs, in the order of `path`.

    Raises:
        ConfigError: the first row that is bad, by file and line; or the files are not about the same prompts; or some
            rows say whether the response finished, and others do not.
    """
    told: set[bool] = set()
    if baseline is None:
        pairs = [Pair(*samples) for samples in _read(path, _AUTHORS[0], _AUTHORS[:0:-1], told)]
    else:
        (answers, others) = (
            [sample for (sample,) in _read(file, "prompt", ("response",), told)] for file in (path, baseline)
        )
        _require_same_prompts(path, answers, baseline, others)
        waiting = defaultdict(list)
        for sample in reversed(others):
            waiting[sample.prompt].append(sample)
        pairs = [Pair(sample, waiting[sample.prompt].pop()) for sample in answers]
    if len(told) > 1:
        files = " and ".join(str(file) for file in (path, baseline) if file)
        raise ConfigError(f"{files}: some rows say how their response ended (finish_reason), and others do not")
    return pairs


def _read(path: Path, prompt: str, responses: Sequence[str], told: set[bool]) -> list[list[Sample]]:
    """Read one sample for each of the fields `responses` of every row; `told` gets whether rows say how they ended."""
    rows = []
    for line, row in read_objects(path):
        where = f"{path}:{line}"
        text, *answers = text_fields(row, (prompt, *responses), where)
        says = says_how_it_ended(row)
        told.add(says)
        finished = row_finished(row, where) or not says
        fields = row_fields({name: value for name, value in row.items() if name not in (prompt, *responses)})
        rows.append(
            [Sample(prompt=text, response=answer, token_ids=(), finished=finished, fields=fields) for answer in answers]
        )
    if not rows:
        raise ConfigError(f"{path}: no rows")
    return rows


def _require_same_prompts(path: Path, answers: Sequence[Sample], other: Path, others: Sequence[Sample]) -> None:
    here, there = (Counter(sample.prompt for sample in samples) for samples in (answers, others))
    for prompt in [*here, *there]:
        if here[prompt] != there[prompt]:
            raise ConfigError(
                f"{path} has {here[prompt]} responses to the prompt {prompt[:60]!r}, {other} has {there[prompt]}; "
                "expected responses to the same prompts"
            )
