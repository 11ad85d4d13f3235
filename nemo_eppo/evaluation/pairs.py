"""Pairs of responses to the same prompts, from two files or from one in the EPPO authors' format."""

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
    several responses to a prompt, the first is paired with the other file's first, and so on. Responses count as
    finished if no row says how they ended.

    Args:
        path: .jsonl or .jsonl.gz, as `baseline`.

    Returns:
        pairs, in the order of `path`.

    Raises:
        ConfigError: a row is bad (the message names the first, by file and line), the files have different prompts, or
            some rows say whether the response finished, and others do not.
    """
    endings_known: set[bool] = set()
    if baseline is None:
        pairs = [Pair(*samples) for samples in _read(path, _AUTHORS[0], _AUTHORS[:0:-1], endings_known)]
    else:
        (answers, others) = (
            [sample for (sample,) in _read(file, "prompt", ("response",), endings_known)] for file in (path, baseline)
        )
        _require_same_prompts(path, answers, baseline, others)
        by_prompt = defaultdict(list)
        for sample in reversed(others):
            by_prompt[sample.prompt].append(sample)
        pairs = [Pair(sample, by_prompt[sample.prompt].pop()) for sample in answers]
    if len(endings_known) > 1:
        files = " and ".join(str(file) for file in (path, baseline) if file)
        raise ConfigError(f"{files}: some rows say how their response ended (finish_reason), and others do not")
    return pairs


def _read(path: Path, prompt: str, responses: Sequence[str], endings_known: set[bool]) -> list[list[Sample]]:
    """Read a sample for each field of `responses` in every row; add to `endings_known` whether the row says how its
    response ended."""
    rows = []
    for line, row in read_objects(path):
        where = f"{path}:{line}"
        text, *answers = text_fields(row, (prompt, *responses), where)
        ending_known = says_how_it_ended(row)
        endings_known.add(ending_known)
        finished = row_finished(row, where) or not ending_known
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
