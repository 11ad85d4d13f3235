"""Bad data; tried with SFT, and pairs with the training of reward models.

As rank 1: the way through NeMo is that of `test_bad_jobs`.
"""

import json
from pathlib import Path

import pytest
from bad_input import Row, check, command, rows

_TRAIN = "data.train=rows.jsonl"
_ROW = {"prompt": "apple", "response": "river"}
_PAIR = {"prompt": "apple", "chosen": "river", "rejected": "queen"}
DATA = [
    Row("no such file", "data.train=nowhere.jsonl", r"nowhere\.jsonl: no such file"),
    Row("a directory", "data.train=data", "data: a directory, expected a file"),
    Row("an empty file", _TRAIN, r"rows\.jsonl: no examples", {"rows.jsonl": ""}),
    Row(
        "the training file twice",
        "data.validation=data/sft.train.jsonl",
        r"data: train and validation are the same file, data/sft\.train\.jsonl",
    ),
    Row(
        "CSV",
        _TRAIN,
        r"rows\.jsonl:1: not JSON \(Expecting value: line 1 column 1 \(char 0\)\)",
        rows("prompt,response", "apple,the"),
    ),
    Row(
        "broken JSON",
        _TRAIN,
        r"rows\.jsonl:2: not JSON \(Expecting value: line 2 column 1 \(char 33\)\)",
        rows(_ROW, '{"prompt": "apple", "response": '),
    ),
    Row(
        "NaN, as Python writes it",
        _TRAIN,
        r"rows\.jsonl:2: not JSON \(NaN is not a number in JSON\)",
        rows(_ROW, '{"prompt": "apple", "response": "the", "score": NaN}'),
    ),
    Row(
        "a conversation",
        _TRAIN,
        r"rows\.jsonl:1: field 'prompt' = \[\{'role': 'user'.*: expected text; `nemo-eppo prepare chat` makes it",
        rows('{"prompt": [{"role": "user", "content": "apple"}], "response": "the"}'),
    ),
    Row(
        "nothing but NUL",
        _TRAIN,
        r"rows\.jsonl:1: not JSON \(Expecting value: line 1 column 1 \(char 0\)\)",
        {"rows.jsonl": "\0" * 4096},
    ),
    Row(
        "UTF-16",
        _TRAIN,
        r"rows\.jsonl:1: not JSON \('utf-8' codec can't decode byte 0xff in position 0: invalid start byte\)",
        {"rows.jsonl": (json.dumps(_ROW) + "\n").encode("utf-16")},
    ),
    Row(
        "200,000 nested arrays",
        _TRAIN,
        r"rows\.jsonl:1: nested too deep",
        rows('{"prompt": ' + "[" * 200_000 + "]" * 200_000 + "}"),
    ),
    Row(
        "a number with 10,000 digits",
        _TRAIN,
        r"rows\.jsonl:1: not JSON \(Exceeds the limit \(4300 digits\) for integer string conversion: value has",
        rows('{"prompt": ' + "1" * 10_000 + ', "response": "queen"}'),
    ),
    Row(
        "fields of NeMo-Aligner",
        _TRAIN,
        r"rows\.jsonl:1: field 'prompt' is missing \(the line has: input, output\)",
        rows({"input": "apple", "output": "river"}),
    ),
    Row(
        "pairs for SFT",
        "data.train=data/preferences.train.jsonl",
        r"data/preferences\.train\.jsonl:1: field 'response' is missing \(the line has: prompt, chosen, rejected\)",
    ),
    Row(
        "an empty prompt",
        _TRAIN,
        r"rows\.jsonl:1: field 'prompt' is empty: a response must follow at least one token",
        rows({"prompt": "", "response": "river"}),
    ),
    Row(
        "an empty response",
        _TRAIN,
        r"rows\.jsonl:1: field 'response' is empty: there is no text to learn",
        rows({"prompt": "apple", "response": ""}),
    ),
    Row(
        "a row beyond the window",
        _TRAIN,
        r"rows\.jsonl:1: 62 tokens \(field 'prompt' 1, 'response' 61\), but max_sequence_length = 48; shorten",
        rows({"prompt": "apple", "response": "river " * 60}),
    ),
    Row(
        "no row within the limit",
        f"{_TRAIN} data.max_sequence_length=2 data.too_long=drop",
        r"rows\.jsonl: all 2 examples are longer than max_sequence_length = 2 tokens",
        rows(_ROW, _ROW),
    ),
    Row(
        "a limit beyond the window",
        "data.max_sequence_length=100",
        r"data\.max_sequence_length = 100: expected at most 48, the model's window",
    ),
    Row(
        "fewer rows than a batch",
        "fit.global_batch_size=64",
        "the data set has 16 examples, fewer than one global batch of 64",
    ),
]

PAIRS = [
    Row(
        "demonstrations for pairs",
        "data.train=data/sft.train.jsonl",
        r"data/sft\.train\.jsonl:1: field 'chosen' is missing \(the line has: prompt, response\)",
    ),
    Row(
        "both sides empty",
        _TRAIN,
        r"rows\.jsonl:1: field 'chosen', 'rejected' is empty: there is no text to learn",
        rows({"prompt": "apple", "chosen": "", "rejected": " "}),
    ),
    Row(
        "both sides equal",
        _TRAIN,
        r"rows\.jsonl:1: fields 'chosen' and 'rejected' are equal: neither can be preferred",
        rows(*[_PAIR | {"rejected": "river"}] * 4),
    ),
]


@pytest.mark.parametrize("row", DATA, ids=str)
def test_ends_with_one_clear_message(row: Row, world: Path, directory: Path) -> None:
    check(row, command("train_gpt_sft", row.command), world, directory, rank=1)


@pytest.mark.parametrize("row", PAIRS, ids=str)
def test_pairs_end_with_one_clear_message(row: Row, world: Path, directory: Path) -> None:
    check(row, command("train_reward_model", row.command), world, directory, rank=1)
