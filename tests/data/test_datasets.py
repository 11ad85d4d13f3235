"""Data sets from JSON lines, padded batches, and an order of batches that survives a restart."""

import gzip
import hashlib
import json
import logging
import tracemalloc
from collections.abc import Callable
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nemo_eppo.config import ConfigError
from nemo_eppo.data import tokenizer
from nemo_eppo.data.datasets import GlobalBatches, PreferenceDataset, PromptDataset, SFTDataset, TokenIds, collate
from nemo_eppo.data.tokenizer import Tokenizer

EOS = 0
DIGEST = "of the data"


def test_prompts(write_rows: Callable[..., Path], words: Tokenizer) -> None:
    path = write_rows({"prompt": "red one"}, {"prompt": "blue", "chosen": "ignored"})
    dataset = PromptDataset(path, words, max_prompt_length=2)
    assert len(dataset) == 2
    assert [(item.index, item.text, item.token_ids.tolist()) for item in dataset.items] == [
        (0, "red one", [2, 5]),
        (1, "blue", [4]),
    ]


def test_prompts_keep_the_other_fields_of_their_rows(write_rows: Callable[..., Path], words: Tokenizer) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": "red", "reference_answer": "blau \u2028 ü", "tests": [{"input": 1, "output": None}]},
        {"prompt": "red one two"},  # too long
        {"prompt": "blue"},
        {"difficulty": 0.1, "prompt": "green", "prompts": "not it"},
    ]
    dataset = PromptDataset(write_rows(*rows), words, max_prompt_length=2, too_long="drop")
    kept = [{name: value for name, value in row.items() if name != "prompt"} for row in (rows[0], *rows[2:])]
    assert [item.fields for item in dataset.items] == kept
    dataset[0].fields.clear()  # what a reward function does to its copy
    assert dataset[0].fields == kept[0]


def test_fields_change_no_digest(write_rows: Callable[..., Path], words: Tokenizer) -> None:
    plain = PromptDataset(write_rows({"prompt": "red"}), words, max_prompt_length=2).digest
    assert PromptDataset(write_rows({"prompt": "red", "answer": 1}), words, max_prompt_length=2).digest == plain
    expected = hashlib.sha256((1).to_bytes(8, "little") + (2).to_bytes(4, "little"))  # one token, with id 2
    assert plain == expected.hexdigest()


def test_fields_take_little_more_memory_than_their_text(write_rows: Callable[..., Path], words: Tokenizer) -> None:
    def bytes_per_row(more: dict[str, Any]) -> float:
        path = write_rows(*({"prompt": "red", **more} for _ in range(2000)))
        tracemalloc.start()
        dataset = PromptDataset(path, words, max_prompt_length=2)
        size = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        return size / len(dataset)

    answers = {"reference_answer": "7", "tests": [{"input": n, "output": str(n)} for n in range(10)]}
    plain, full = bytes_per_row({}), bytes_per_row(answers)
    assert full - plain < 2 * len(json.dumps(answers)), "the objects themselves would take more than 3 kB"


def test_sft_and_preferences(write_rows: Callable[..., Path], words: Tokenizer) -> None:
    path = write_rows({"prompt": "red", "response": "one two", "chosen": "one", "rejected": ""})
    item = SFTDataset(path, words, max_sequence_length=4)[0]
    assert (item.prompt_ids.tolist(), item.response_ids.tolist()) == ([2], [5, 6, EOS])
    pair = PreferenceDataset(path, words, max_sequence_length=4)[0]
    assert (pair.prompt_ids.tolist(), pair.chosen_ids.tolist(), pair.rejected_ids.tolist()) == ([2], [5, EOS], [EOS])


def test_gzipped_rows(tmp_path: Path, words: Tokenizer) -> None:
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps({"prompt": "red"}).encode()))
    assert PromptDataset(path, words, max_prompt_length=1)[0].token_ids.tolist() == [2]


def test_rows_keep_their_order_across_tokenised_chunks(
    write_rows: Callable[..., Path], words: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"prompt": "red " * (1 + n % 3), "response": "one " * (1 + n % 5)} for n in range(10)]
    path = write_rows(*rows)
    whole = SFTDataset(path, words, max_sequence_length=9)
    monkeypatch.setattr(tokenizer, "_TOKENISED_AT_ONCE", 3)
    for first, second in zip(whole.items, SFTDataset(path, words, max_sequence_length=9).items, strict=True):
        assert first.index == second.index
        assert np.array_equal(first.prompt_ids, second.prompt_ids)
        assert np.array_equal(first.response_ids, second.response_ids)
    assert [len(item.response_ids) for item in whole.items] == [2 + n % 5 for n in range(10)]


def test_a_prompt_beyond_the_window_is_named(write_rows: Callable[..., Path], words: Tokenizer) -> None:
    path = write_rows({"prompt": "red"}, {"prompt": "red one two"})
    with pytest.raises(ConfigError, match=r"rows\.jsonl:2: 3 tokens \(field 'prompt' 3\), but max_prompt_length = 2"):
        PromptDataset(path, words, max_prompt_length=2)


def test_the_sequence_limit_counts_prompt_longer_response_and_eos(
    write_rows: Callable[..., Path], words: Tokenizer
) -> None:
    path = write_rows({"prompt": "red", "chosen": "one", "rejected": "one two"})
    assert len(PreferenceDataset(path, words, max_sequence_length=4)) == 1
    with pytest.raises(ConfigError, match=r":1: 4 tokens \(field 'prompt' 1, 'chosen' 2, 'rejected' 3\), but max_seq"):
        PreferenceDataset(path, words, max_sequence_length=3)


def test_long_rows_are_dropped_on_request_and_counted(
    write_rows: Callable[..., Path], words: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_rows({"prompt": "red one"}, {"prompt": "blue"}, {"prompt": "green"})
    with caplog.at_level(logging.WARNING):
        dataset = PromptDataset(path, words, max_prompt_length=1, too_long="drop")
    assert [(item.index, item.text) for item in dataset.items] == [(0, "blue"), (1, "green")]
    assert "dropped 1 of 3" in caplog.text


def test_a_data_set_that_ends_up_empty_is_an_error(write_rows: Callable[..., Path], words: Tokenizer) -> None:
    with pytest.raises(ConfigError, match=r"rows\.jsonl: no examples"):
        PromptDataset(write_rows(), words, max_prompt_length=1)
    with pytest.raises(ConfigError, match=r"all 1 examples are longer than max_prompt_length = 1"):
        PromptDataset(write_rows({"prompt": "red red"}), words, max_prompt_length=1, too_long="drop")


def test_defects_name_file_line_and_field(write_rows: Callable[..., Path], words: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.jsonl: no such file"):
        PromptDataset(tmp_path / "absent.jsonl", words, max_prompt_length=1)
    with pytest.raises(ConfigError, match=r"rows\.jsonl:1: field 'rejected' is missing"):
        PreferenceDataset(write_rows({"prompt": "red", "chosen": "one"}), words, max_sequence_length=9)
    with pytest.raises(ConfigError, match=r"rows\.jsonl:2: field 'prompt' is empty"):
        PromptDataset(write_rows({"prompt": "red"}, {"prompt": " "}), words, max_prompt_length=9)
    with pytest.raises(ConfigError, match=r"rows\.jsonl:3: cannot be tokenised.*purple"):
        PromptDataset(write_rows({"prompt": "red"}, "", {"prompt": "purple"}), words, max_prompt_length=9)
    path = write_rows({"prompt": "red", "response": "one"}, {"prompt": "red", "response": "one <eos> two"})
    with pytest.raises(ConfigError, match=r"rows\.jsonl:2: response contains the end-of-sequence token"):
        SFTDataset(path, words, max_sequence_length=9)


@pytest.mark.parametrize("response", ["", " \n", "<eos>"])
def test_a_response_without_text_is_an_error_in_sft_but_may_lose_a_comparison(
    response: str, write_rows: Callable[..., Path], words: Tokenizer
) -> None:
    path = write_rows({"prompt": "red", "response": "one"}, {"prompt": "red", "response": response})
    with pytest.raises(ConfigError, match=r"rows\.jsonl:2: field 'response' is empty: there is no text to learn"):
        SFTDataset(path, words, max_sequence_length=9)
    pair = write_rows({"prompt": "red", "chosen": "one", "rejected": response})
    assert PreferenceDataset(pair, words, max_sequence_length=9)[0].rejected_ids.tolist() == [EOS]
    with pytest.raises(ConfigError, match=r"rows\.jsonl:1: field 'chosen', 'rejected' is empty"):
        PreferenceDataset(
            write_rows({"prompt": "red", "chosen": response, "rejected": response}), words, max_sequence_length=9
        )


def test_collate_pads_on_the_right() -> None:
    pairs: list[tuple[list[int], list[int] | TokenIds]] = [
        ([5, 6], [7, EOS]),
        ([5], np.array([8, 9, 9, EOS], dtype=np.int32)),
    ]
    tokens, prompt_lengths, lengths = collate(pairs, pad_id=1)
    assert tokens.tolist() == [[5, 6, 7, EOS, 1], [5, 8, 9, 9, EOS]]
    assert tokens.dtype == prompt_lengths.dtype == lengths.dtype == torch.int64
    assert (prompt_lengths.tolist(), lengths.tolist()) == ([2, 1], [4, 5])


def test_an_epoch_visits_each_index_at_most_once_and_drops_the_rest() -> None:
    batches = GlobalBatches(10, 3, seed=0, digest=DIGEST)
    for _ in range(4):
        epoch = [index for batch in islice(batches, 3) for index in batch]
        assert len(set(epoch)) == 9
        assert set(epoch) <= set(range(10))
    assert batches.epoch == 3


def test_order_follows_seed_and_epoch_only() -> None:
    def epochs(batch_size: int, seed: int) -> list[list[int]]:
        batches = GlobalBatches(60, batch_size, seed=seed, digest=DIGEST)
        return [list(chain(*islice(batches, 60 // batch_size))) for _ in range(2)]

    assert epochs(4, seed=1) == epochs(10, seed=1)
    first, second = epochs(4, seed=1)
    assert first != second
    assert epochs(4, seed=2)[0] != first


@pytest.mark.parametrize("taken", [0, 1, 3, 4, 11])
def test_resume_continues_exactly(taken: int) -> None:
    batches = GlobalBatches(10, 3, seed=4, digest=DIGEST)
    list(islice(batches, taken))
    state = json.loads(json.dumps(batches.state_dict()))
    resumed = GlobalBatches(10, 3, seed=4, digest=DIGEST)
    next(resumed)
    resumed.load_state_dict(state)
    assert list(islice(resumed, 9)) == list(islice(batches, 9))


@pytest.mark.parametrize("changed", [{"num_items": 11}, {"batch_size": 2}, {"seed": 5}, {"digest": "other"}])
def test_resume_with_another_data_order_is_refused(changed: dict[str, Any]) -> None:
    settings: dict[str, Any] = {"num_items": 10, "batch_size": 3, "seed": 4, "digest": DIGEST}
    state = GlobalBatches(**settings).state_dict()
    [(name, value)] = changed.items()
    with pytest.raises(ConfigError, match=f"{name}.* was {settings[name]}, and is now {value}"):
        GlobalBatches(**(settings | changed)).load_state_dict(state)


def test_a_digest_tells_the_same_tokens_from_others(write_rows: Callable[..., Path], words: Tokenizer) -> None:
    def digest(prompt: str, chosen: str, rejected: str, **more: str) -> str:
        path = write_rows({"prompt": prompt, "chosen": chosen, "rejected": rejected, **more})
        return PreferenceDataset(path, words, max_sequence_length=9).digest

    made = {digest("red", "one", "blue"), digest("red", "blue", "one"), digest("red one", "blue", "")}
    assert len(made) == 3
    assert digest("red", "one", "blue", source="elsewhere") in made
    assert digest("red", "one blue", "blue") != digest("red", "one", "blue blue")  # the same tokens in a row


def test_fewer_examples_than_one_batch_names_both_numbers() -> None:
    with pytest.raises(ConfigError, match=r"7 examples.* batch of 8"):
        GlobalBatches(7, 8, seed=0, digest=DIGEST)
