"""Preparation: what is dropped and why, which side of the split a row is on, and the real HH corpus from end to end."""

import gzip
import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from small_data import dialogue, read_rows

from nemo_eppo.config import ConfigError, load_config
from nemo_eppo.data.datasets import PreferenceDataset, PromptDataset, SFTDataset
from nemo_eppo.data.tokenizer import Tokenizer, train_bpe, word_level
from nemo_eppo.settings.preparation import PreparationConfig
from nemo_eppo.tools.corpora import CORPORA
from nemo_eppo.tools.preparation import PreparationCounts, prepare

SHARED_DATA = Path(os.environ.get("NEMO_EPPO_DATA") or Path(__file__).parents[3] / "shared" / "data")
HH = SHARED_DATA / "hh-harmless-base-test.jsonl.gz"


def both(directory: Path, kind: str) -> list[dict[str, str]]:
    return read_rows(directory / f"{kind}.train.jsonl") + read_rows(directory / f"{kind}.validation.jsonl")


def pair(question: str, chosen: str = "One.", rejected: str = "No.") -> dict[str, str]:
    return {"chosen": dialogue(question, chosen), "rejected": dialogue(question, rejected)}


def pairs(count: int) -> list[Mapping[str, object]]:
    return [pair(f"What is {n}?") for n in range(count)]


def prepare_small(corpus: str, path: Path, out_dir: Path, **settings: Any) -> PreparationCounts:
    return prepare(CORPORA[corpus], [path], out_dir, small(**settings))


def small(**settings: Any) -> PreparationConfig:
    return load_config(PreparationConfig, {"validation_fraction": 0.3, "vocab_size": 300, **settings})


def test_a_table_of_several_layouts_gives_the_rows_of_the_same_lines(
    write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    rows: list[dict[str, object]] = [
        {"instruction": f"Say {n}.", **({"output": "x"} if n % 3 == 0 else {})}
        | ({"output_1": "a", "output_2": "b", "preference": 2} if n % 3 == 1 else {})
        for n in range(60)
    ]
    columns = ("instruction", "output", "output_1", "output_2", "preference")
    table = pyarrow.table({name: [row.get(name) for row in rows] for name in columns})
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    counts = prepare_small("alpaca_farm", tmp_path / "rows.parquet", tmp_path / "table")
    assert not counts.dropped
    assert counts.written == prepare_small("alpaca_farm", write_rows(*rows), tmp_path / "lines").written


def test_unusable_rows_are_dropped_and_listed(write_rows: Callable[..., Path], tmp_path: Path) -> None:
    bad = [
        {"chosen": dialogue("a", "x"), "rejected": dialogue("b", "y")},
        pair("a", " \n", "y"),
        pair("a", "x", ""),
        pair("a", "x", "x"),
        pair("a", "x<eos>y", "z"),
        {"chosen": "x"},
        "{'chosen'",
        {"chosen": dialogue("b", "x"), "rejected": dialogue("a", "y")},
    ]
    path = write_rows(*pairs(20), *bad)
    counts = prepare_small("hh", path, tmp_path / "out")
    reasons = [
        "prompts differ",
        "empty chosen response",
        "empty rejected response",
        "chosen equals rejected",
        "chosen response contains the end-of-sequence token",
        "field 'rejected' is missing",
        "not JSON",
        "prompts differ",
    ]
    assert counts.read == 28
    assert counts.dropped == {reason: reasons.count(reason) for reason in reasons}
    assert f"2 prompts differ (first: {path}:21)" in str(counts)
    assert read_rows(tmp_path / "out" / "dropped.jsonl") == [
        {"file": str(path), "line": line, "reason": reason} for line, reason in enumerate(reasons, start=21)
    ]


@pytest.mark.parametrize(
    ("row", "reason"), [(pair("a", "", "y"), "empty chosen response"), ("[]", "not a JSON object"), ({}, "is missing")]
)
def test_strict_stops_at_the_first_unusable_row(
    write_rows: Callable[..., Path], tmp_path: Path, row: dict[str, str] | str, reason: str
) -> None:
    path = write_rows(*pairs(3), row)
    with pytest.raises(ConfigError, match=rf"rows\.jsonl:4: .*{reason}"):
        prepare_small("hh", path, tmp_path / "out", strict=True)
    assert not (tmp_path / "out").exists()


def test_strict_accepts_duplicates_and_long_rows(write_rows: Callable[..., Path], tmp_path: Path) -> None:
    train_bpe([], 258, tmp_path / "bytes")  # one token per byte
    path = write_rows(*pairs(20), *pairs(1), pair("?" * 200))
    counts = prepare_small(
        "hh", path, tmp_path / "out", strict=True, tokenizer=tmp_path / "bytes", max_prompt_tokens=200
    )
    assert counts.dropped == {"duplicate": 1, "prompt longer than 200 tokens": 1}


def test_duplicates_are_dropped_but_not_other_answers_to_a_prompt(
    write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    other = [pair("What is 1?", "One.", "Never."), pair("What is 1?", "Two.", "No.")]
    path = write_rows(*pairs(20), *pairs(5), *other)
    counts = prepare_small("hh", path, tmp_path / "out")
    assert counts.dropped == {"duplicate": 5}
    assert len(both(tmp_path / "out", "preferences")) == 22
    assert len(both(tmp_path / "out", "sft")) == 21
    assert len(both(tmp_path / "out", "prompts")) == 20


def test_the_split_does_not_depend_on_order_files_or_repetition(
    write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    whole = write_rows(*pairs(60), name="whole.jsonl")
    parts = [write_rows(*pairs(60)[30:], name="b.jsonl"), write_rows(*pairs(30), name="a.jsonl"), whole]
    prepare(CORPORA["hh"], [whole], tmp_path / "one", small())
    prepare(CORPORA["hh"], parts, tmp_path / "three", small())
    for name in ("preferences.train", "preferences.validation", "sft.train", "prompts.train", "prompts.validation"):
        one, three = (read_rows(tmp_path / directory / f"{name}.jsonl") for directory in ("one", "three"))
        assert sorted(map(str, one)) == sorted(map(str, three))
    assert 6 <= len(read_rows(tmp_path / "one" / "prompts.validation.jsonl")) <= 30


def test_dialogues_that_share_their_opening_never_straddle_the_split(
    write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    rows = []
    for opening in range(20):
        for reply in range(3):
            start = dialogue(f"Tell me {opening}", f"Reply {reply}.")
            rows.append({"chosen": start + dialogue("Why?", "So."), "rejected": start + dialogue("Why?", "No.")})
    prepare_small("hh", write_rows(*rows), tmp_path / "out")
    openings = [
        {row["prompt"].split("\n\n")[1] for row in read_rows(tmp_path / "out" / f"prompts.{split}.jsonl")}
        for split in ("train", "validation")
    ]
    assert not openings[0] & openings[1]
    assert len(openings[0] | openings[1]) == 20
    assert len(both(tmp_path / "out", "prompts")) == 60


def test_each_kind_of_corpus_gives_the_files_it_can(write_rows: Callable[..., Path], tmp_path: Path) -> None:
    demonstrations = write_rows(*({"input": f"in {n}", "output": f"out {n}"} for n in range(20)), name="sft.jsonl")
    prompts = write_rows(*({"text": f"in {n}"} for n in range(20)), name="prompts.jsonl")
    prepare_small("nemo_aligner", demonstrations, tmp_path / "sft")
    prepare_small("prompts", prompts, tmp_path / "prompts")
    splits = ("train", "validation")
    assert {path.name for path in (tmp_path / "prompts").glob("*.jsonl")} == {
        f"prompts.{split}.jsonl" for split in splits
    }
    assert {path.name for path in (tmp_path / "sft").glob("*.jsonl")} == {
        f"{kind}.{split}.jsonl" for kind in ("sft", "prompts") for split in splits
    }
    for name in ("train", "validation"):
        assert read_rows(tmp_path / "sft" / f"prompts.{name}.jsonl") == read_rows(
            tmp_path / "prompts" / f"prompts.{name}.jsonl"
        )
    for row in both(tmp_path / "sft", "sft"):
        assert row["response"] == row["prompt"].replace("in", "out")


def test_a_tokenizer_is_trained_on_the_usable_training_rows_alone(
    write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    bad = {"chosen": dialogue("zebra zebra zebra", "x"), "rejected": dialogue("yak yak yak", "y")}
    prepare_small("hh", write_rows(*pairs(60), bad), tmp_path / "out", vocab_size=400)
    train = read_rows(tmp_path / "out" / "preferences.train.jsonl")
    train_bpe((text for row in train for text in row.values()), 400, tmp_path / "expected")
    trained, expected = (Tokenizer.from_directory(tmp_path / name) for name in ("out/tokenizer", "expected"))
    assert trained.digest == expected.digest


def test_rows_beyond_the_token_limits_are_dropped_by_a_given_tokenizer(
    write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    train_bpe([], 258, tmp_path / "bytes")  # one token per byte
    exact = pair("a", "x" * 48, "y")  # a space, 48 bytes, EOS
    path = write_rows(*pairs(20), pair("?" * 90), pair("a", "x", "y" * 90), exact)
    limits = {"max_prompt_tokens": 50, "max_response_tokens": 50}
    counts = prepare_small("hh", path, tmp_path / "out", tokenizer=tmp_path / "bytes", **limits)
    assert counts.dropped == {"prompt longer than 50 tokens": 1, "response longer than 50 tokens": 1}
    assert [row["line"] for row in read_rows(tmp_path / "out" / "dropped.jsonl")] == [21, 22]
    original, copy = (Tokenizer.from_directory(tmp_path / name) for name in ("bytes", "out/tokenizer"))
    assert copy.digest == original.digest


def test_what_a_given_tokenizer_cannot_encode_is_dropped(write_rows: Callable[..., Path], tmp_path: Path) -> None:
    word_level(["in", "out", *map(str, range(20))], tmp_path / "words")
    rows = [{"input": f"in {n}", "output": f"out {n} <eos>"} for n in range(20)]
    path = write_rows(*rows, {"input": "in purple", "output": "out 1"}, {"input": "in 2", "output": "purple"})
    counts = prepare_small("nemo_aligner", path, tmp_path / "out", tokenizer=tmp_path / "words")
    assert counts.dropped == {"cannot be tokenised": 2}
    assert {row["response"].split()[-1] for row in both(tmp_path / "out", "sft")} == set(map(str, range(20)))


def test_a_system_prompt_goes_in_front_of_plain_text_that_has_none(
    write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    prepare_small("hh", write_rows(*pairs(20)), tmp_path / "out", system_prompt="Be brief.")
    assert "Be brief.\n\nHuman: What is 7?\n\nAssistant:" in {row["prompt"] for row in both(tmp_path / "out", "sft")}
    turns = [{"from": "User", "value": "Hi"}, {"from": "Bot", "value": "Hello."}]
    rows = [
        {"system": f"Rule {n}.", "mask": "User", "conversations": [{**turns[0], "value": f"{n}?"}, turns[1]]}
        for n in range(20)
    ]
    prepare_small("nemo_aligner", write_rows(*rows), tmp_path / "own", system_prompt="Be brief.")
    assert {row["prompt"] for row in both(tmp_path / "own", "sft")} == {
        f"Rule {n}.\n\nHuman: {n}?\n\nAssistant:" for n in range(20)
    }


def test_settings_and_inputs_that_cannot_work_are_named(write_rows: Callable[..., Path], tmp_path: Path) -> None:
    path = write_rows(*pairs(3))
    with pytest.raises(ConfigError, match=r"validation_fraction = 1\.5"):
        prepare_small("hh", path, tmp_path / "out", validation_fraction=1.5)
    with pytest.raises(ConfigError, match="max_prompt_tokens = 0"):
        prepare_small("hh", path, tmp_path / "out", max_prompt_tokens=0)
    for keep in (("answer", "prompt"), ("",), ("answer", "answer")):
        with pytest.raises(ConfigError, match=r"keep = \(.*\): expected names of fields"):
            prepare_small("hh", path, tmp_path / "out", keep=keep)
    with pytest.raises(ConfigError, match=r"nothing is left for preferences\.validation\.jsonl"):
        prepare_small("hh", path, tmp_path / "out", validation_fraction=1e-9)
    wrong_corpus = write_rows({"prompt": "x"})
    with pytest.raises(
        ConfigError, match=r"nothing is left(?s:.*)1 field 'chosen' is missing \(first: .*rows\.jsonl:1"
    ):
        prepare_small("hh", wrong_corpus, tmp_path / "out")


def test_rows_of_the_trainers_are_split_again_without_a_change(write_rows: Callable[..., Path], tmp_path: Path) -> None:
    rows: list[dict[str, str]] = [
        {"prompt": f" Q{n}: \n", **answers}
        for n in range(20)
        for answers in ({}, {"response": f"\tA{n} "}, {"chosen": f" c{n}", "rejected": "r\n"})
    ]
    counts = prepare_small("rows", write_rows(*rows), tmp_path / "out")
    assert not counts.dropped
    made = {kind: both(tmp_path / "out", kind) for kind in ("prompts", "sft", "preferences")}
    assert sorted(map(str, made["prompts"])) == sorted(str(row) for row in rows if len(row) == 1)
    assert sorted(map(str, made["preferences"])) == sorted(str(row) for row in rows if len(row) == 3)
    assert {row["response"] for row in made["sft"]} == {f"\tA{n} " for n in range(20)} | {f" c{n}" for n in range(20)}
    train = tmp_path / "out" / "preferences.train.jsonl"
    again = prepare_small("rows", train, tmp_path / "again", validation_fraction=0.7)
    assert again.read == len(read_rows(train))
    assert sorted(map(str, both(tmp_path / "again", "preferences"))) == sorted(map(str, read_rows(train)))


def test_kept_fields_stand_in_the_prompts_files_alone(write_rows: Callable[..., Path], tmp_path: Path) -> None:
    rows = [
        {"prompt": f"{n}?", "response": f"So {n}.", "answer": n, "source": {"name": "é"}, "other": 1} for n in range(20)
    ]
    bad = {"prompt": " ", "response": "x"}  # is dropped, whatever it lacks
    counts = prepare_small("rows", write_rows(*rows, bad, rows[3]), tmp_path / "out", keep=("answer", "source"))
    assert counts.dropped == {"empty prompt": 1, "duplicate": 1}
    prompts: list[dict[str, Any]] = [*both(tmp_path / "out", "prompts")]
    kept = [{name: row[name] for name in ("prompt", "answer", "source")} for row in rows]
    assert sorted(prompts, key=lambda row: row["answer"]) == kept
    assert all(row.keys() == {"prompt", "response"} for row in both(tmp_path / "out", "sft"))
    tokenizer = Tokenizer.from_directory(tmp_path / "out" / "tokenizer")
    item = PromptDataset(tmp_path / "out" / "prompts.train.jsonl", tokenizer, max_prompt_length=99)[0]
    assert item.fields == {"answer": int(item.text[:-1]), "source": {"name": "é"}}


def test_a_prompt_with_another_answer_is_another_prompt(write_rows: Callable[..., Path], tmp_path: Path) -> None:
    rows = [{"prompt": f"{n}?", "answer": answer} for n in range(20) for answer in ("a", "b", "a")]
    counts = prepare_small("prompts", write_rows(*rows), tmp_path / "out", keep=("answer",))
    assert counts.dropped == {"duplicate": 20}
    assert len(both(tmp_path / "out", "prompts")) == 40


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"prompt": "x"}, r"rows\.jsonl:21: field 'answer' is missing, which is to be kept \(found: prompt\)"),
        ({"prompt": "x", "answer": None}, r"rows\.jsonl:21: field 'answer' is missing"),
        ({"prompt": "x", "answer": ["\ud800"]}, r"rows\.jsonl:21: field 'answer' cannot be kept: .*surrogates"),
    ],
)
def test_a_row_without_a_field_to_keep_is_an_error(
    write_rows: Callable[..., Path], tmp_path: Path, row: dict[str, Any], complaint: str
) -> None:
    path = write_rows(*({"prompt": f"{n}?", "answer": n} for n in range(20)), row)
    with pytest.raises(ConfigError, match=complaint):
        prepare_small("prompts", path, tmp_path / "out", keep=("answer",))
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not HH.is_file(), reason=f"needs {HH.name}; set NEMO_EPPO_DATA to the directory that holds it")
def test_the_real_corpus_from_end_to_end(tmp_path: Path) -> None:
    """2,312 rows: 5 with unequal prompts and 4 with an empty answer, found by comparing the dialogues directly.

    None is repeated, and 128 openings have several prompts.
    """
    out = tmp_path / "hh"
    counts = prepare(CORPORA["hh"], [HH], out, small(validation_fraction=0.1, vocab_size=1024))
    assert counts.read == 2312
    assert counts.dropped == {"prompts differ": 5, "empty chosen response": 4}
    with gzip.open(HH, "rt", encoding="utf-8") as file:
        corpus = [json.loads(line) for line in file]
    lines = {row["line"]: row["reason"] for row in read_rows(out / "dropped.jsonl")}
    kept = [row for number, row in enumerate(corpus, start=1) if number not in lines]

    train, validation = (read_rows(out / f"preferences.{split}.jsonl") for split in ("train", "validation"))
    rebuilt = {(row["prompt"] + row["chosen"], row["prompt"] + row["rejected"]) for row in train + validation}
    assert len(train) + len(validation) == 2303
    assert rebuilt == {(row["chosen"], row["rejected"]) for row in kept}
    assert 150 <= len(validation) <= 310
    first_turn = re.compile(r"\n\nHuman: *(.*?)\s*\n\nAssistant:", re.DOTALL)
    openings = [{first_turn.match(row["prompt"])[1] for row in rows} for rows in (train, validation)]  # type: ignore[index]
    assert not openings[0] & openings[1]
    assert len(openings[0] | openings[1]) == 2169
    assert len(read_rows(out / "prompts.train.jsonl")) == len({row["prompt"] for row in train})
    assert read_rows(out / "sft.train.jsonl")[0] == {"prompt": train[0]["prompt"], "response": train[0]["chosen"]}

    tokenizer = Tokenizer.from_directory(out / "tokenizer")
    assert tokenizer.vocab_size == 1024
    dataset = PreferenceDataset(
        out / "preferences.validation.jsonl", tokenizer, max_sequence_length=2048, too_long="drop"
    )
    for row, item in list(zip(validation, dataset.items, strict=True))[:20]:
        assert tokenizer.decode(item.prompt_ids.tolist() + item.chosen_ids.tolist()) == row["prompt"] + row["chosen"]
    assert len(SFTDataset(out / "sft.validation.jsonl", tokenizer, max_sequence_length=4096)) == len(validation)
    prompts = PromptDataset(out / "prompts.train.jsonl", tokenizer, max_prompt_length=256, too_long="drop")
    assert 0 < len(prompts) < len(train)
