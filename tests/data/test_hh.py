"""HH dialogues: where a pair is split, what is dropped and why, and the real corpus from end to end."""

import gzip
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from nemo_eppo.config import ConfigError
from nemo_eppo.data.datasets import PreferenceDataset, PromptDataset, SFTDataset
from nemo_eppo.data.hh import prepare_hh, split_pair
from nemo_eppo.data.tokenizer import Tokenizer, train_bpe

SHARED_DATA = Path(os.environ.get("NEMO_EPPO_DATA") or Path(__file__).parents[3] / "shared" / "data")
HH = SHARED_DATA / "hh-harmless-base-test.jsonl.gz"
FILES = [f"{kind}.{split}.jsonl" for kind in ("preferences", "sft", "prompts") for split in ("train", "validation")]


def read(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def dialogue(question: str, answer: str) -> str:
    return f"\n\nHuman: {question}\n\nAssistant: {answer}"


def rows(count: int) -> list[Mapping[str, object]]:
    return [
        {"chosen": dialogue(f"What is {n}?", "One."), "rejected": dialogue(f"What is {n}?", "No.")}
        for n in range(count)
    ]


def test_the_prompt_ends_with_the_last_assistant_marker() -> None:
    start = dialogue("Hi", "Hello.")
    chosen, rejected = start + dialogue("Why?", "So."), start + dialogue("Why?", "No\nidea.")
    assert split_pair(chosen, rejected) == (start + "\n\nHuman: Why?\n\nAssistant:", " So.", " No\nidea.", "")


@pytest.mark.parametrize(
    ("chosen", "rejected", "defect"),
    [
        (dialogue("a", "x"), dialogue("b", "y"), "prompts differ"),
        (dialogue("a", "x") + dialogue("b", "y"), dialogue("a", "z"), "prompts differ"),
        (dialogue("a", " \n"), dialogue("a", "y"), "empty chosen response"),
        (dialogue("a", "x"), dialogue("a", ""), "empty rejected response"),
        (dialogue("a", "x"), dialogue("a", "x"), "chosen equals rejected"),
        ("no turns", "no turns", "no assistant turn"),
    ],
)
def test_an_unusable_pair_says_why(chosen: str, rejected: str, defect: str) -> None:
    assert split_pair(chosen, rejected)[3] == defect


def test_unusable_rows_are_dropped_and_listed(write_rows: Callable[..., Path], tmp_path: Path) -> None:
    bad = {"chosen": dialogue("a", "x"), "rejected": dialogue("b", "y")}
    path = write_rows(*rows(20), bad, bad)
    counts = prepare_hh([path], tmp_path / "out", validation_fraction=0.3, bpe_vocab_size=300)
    assert (counts.read, counts.dropped) == (22, {"prompts differ": 2})
    assert f"2 prompts differ (first: {path}:21)" in str(counts)
    reason = {"file": str(path), "reason": "prompts differ"}
    assert read(tmp_path / "out" / "dropped.jsonl") == [{**reason, "line": 21}, {**reason, "line": 22}]


def test_strict_stops_at_the_first_unusable_row(write_rows: Callable[..., Path], tmp_path: Path) -> None:
    path = write_rows(*rows(3), {"chosen": dialogue("a", ""), "rejected": dialogue("a", "y")})
    with pytest.raises(ConfigError, match=r"rows\.jsonl:4: empty chosen response"):
        prepare_hh([path], tmp_path / "out", strict=True)
    assert not any((tmp_path / "out").iterdir())


def test_the_split_does_not_depend_on_order_files_or_repetition(
    write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    whole = write_rows(*rows(60), name="whole.jsonl")
    halves = [write_rows(*rows(60)[30:], name="b.jsonl"), write_rows(*rows(30), name="a.jsonl"), whole]
    settings = {"validation_fraction": 0.3, "bpe_vocab_size": 300}
    prepare_hh([whole], tmp_path / "one", **settings)  # type: ignore[arg-type]
    prepare_hh(halves, tmp_path / "three", **settings)  # type: ignore[arg-type]
    for name in ("prompts.train.jsonl", "prompts.validation.jsonl"):
        one, three = read(tmp_path / "one" / name), read(tmp_path / "three" / name)
        assert len(one) == len(three)
        assert {row["prompt"] for row in one} == {row["prompt"] for row in three}
    assert 6 <= len(read(tmp_path / "one" / "prompts.validation.jsonl")) <= 30
    assert len(read(tmp_path / "three" / "preferences.train.jsonl")) == 2 * len(
        read(tmp_path / "one" / "preferences.train.jsonl")
    )


def test_a_tokenizer_is_trained_on_the_usable_training_rows_alone(
    write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    bad = {"chosen": dialogue("zebra zebra zebra", "x"), "rejected": dialogue("yak yak yak", "y")}
    path = write_rows(*rows(60), bad)
    prepare_hh([path], tmp_path / "out", validation_fraction=0.3, bpe_vocab_size=400)
    train = read(tmp_path / "out" / "preferences.train.jsonl")
    train_bpe((text for row in train for text in row.values()), 400, tmp_path / "expected")
    trained, expected = (Tokenizer.from_directory(tmp_path / name) for name in ("out/tokenizer", "expected"))
    assert trained.digest() == expected.digest()


def test_rows_beyond_the_token_limits_are_dropped_by_a_given_tokenizer(
    write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    train_bpe([], 258, tmp_path / "bytes")  # one token per byte
    long_prompt = {"chosen": dialogue("?" * 90, "a"), "rejected": dialogue("?" * 90, "b")}
    long_response = {"chosen": dialogue("a", "x"), "rejected": dialogue("a", "y" * 90)}
    exact = {"chosen": dialogue("a", "x" * 48), "rejected": dialogue("a", "y")}  # a space, 48 bytes, EOS
    path = write_rows(*rows(20), long_prompt, long_response, exact)
    counts = prepare_hh(
        [path],
        tmp_path / "out",
        validation_fraction=0.3,
        tokenizer_dir=tmp_path / "bytes",
        max_prompt_tokens=50,
        max_response_tokens=50,
    )
    assert counts.dropped == {"prompt longer than 50 tokens": 1, "response longer than 50 tokens": 1}
    assert [row["line"] for row in read(tmp_path / "out" / "dropped.jsonl")] == [21, 22]
    original, copy = (Tokenizer.from_directory(tmp_path / name) for name in ("bytes", "out/tokenizer"))
    assert copy.digest() == original.digest()


def test_settings_and_inputs_that_cannot_work_are_named(write_rows: Callable[..., Path], tmp_path: Path) -> None:
    path = write_rows(*rows(3))
    with pytest.raises(ConfigError, match=r"validation_fraction = 1\.5"):
        prepare_hh([path], tmp_path / "out", validation_fraction=1.5)
    with pytest.raises(ConfigError, match="max_prompt_tokens = 0"):
        prepare_hh([path], tmp_path / "out", max_prompt_tokens=0)
    with pytest.raises(ConfigError, match="no pair is left for validation"):
        prepare_hh([path], tmp_path / "out", validation_fraction=1e-9, bpe_vocab_size=300)
    with pytest.raises(ConfigError, match=r"rows\.jsonl:1: field 'rejected' is missing"):
        prepare_hh([write_rows({"chosen": "x"})], tmp_path / "out")


@pytest.mark.skipif(not HH.is_file(), reason=f"needs {HH.name}; set NEMO_EPPO_DATA to the directory that holds it")
def test_the_real_corpus_from_end_to_end(tmp_path: Path) -> None:
    """2,312 rows: 5 with unequal prompts and 4 with an empty answer, found by comparing the dialogues directly."""
    out = tmp_path / "hh"
    counts = prepare_hh([HH], out, validation_fraction=0.1, bpe_vocab_size=1024)
    assert counts.read == 2312
    assert counts.dropped == {"prompts differ": 5, "empty chosen response": 4}
    with gzip.open(HH, "rt", encoding="utf-8") as file:
        corpus = [json.loads(line) for line in file]
    lines = {row["line"]: row["reason"] for row in read(out / "dropped.jsonl")}
    kept = [row for number, row in enumerate(corpus, start=1) if number not in lines]

    train, validation = (read(out / f"preferences.{split}.jsonl") for split in ("train", "validation"))
    rebuilt = {(row["prompt"] + row["chosen"], row["prompt"] + row["rejected"]) for row in train + validation}
    assert len(train) + len(validation) == 2303
    assert rebuilt == {(row["chosen"], row["rejected"]) for row in kept}
    assert 150 <= len(validation) <= 310
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in validation}
    assert len(read(out / "prompts.train.jsonl")) == len({row["prompt"] for row in train})
    assert read(out / "sft.train.jsonl")[0] == {"prompt": train[0]["prompt"], "response": train[0]["chosen"]}

    tokenizer = Tokenizer.from_directory(out / "tokenizer")
    assert tokenizer.vocab_size == 1024
    pairs = PreferenceDataset(
        out / "preferences.validation.jsonl", tokenizer, max_sequence_length=2048, too_long="drop"
    )
    for row, item in list(zip(validation, pairs.items, strict=True))[:20]:
        assert tokenizer.decode(item.prompt_ids.tolist() + item.chosen_ids.tolist()) == row["prompt"] + row["chosen"]
    assert len(SFTDataset(out / "sft.validation.jsonl", tokenizer, max_sequence_length=4096)) == len(validation)
    prompts = PromptDataset(out / "prompts.train.jsonl", tokenizer, max_prompt_length=256, too_long="drop")
    assert 0 < len(prompts) < len(train)
