"""The noun task against its description: the formula by hand, the generator by its statistics."""

import math
from pathlib import Path
from random import Random

import numpy as np
import pytest
from small_data import read_rows

from nemo_eppo.config import ConfigError
from nemo_eppo.data.tokenizer import Tokenizer
from nemo_eppo.tools.noun_task import (
    DISTRACTORS,
    HEDGES,
    MAX_RESPONSE_TOKENS,
    NOUNS,
    SEPARATOR,
    hedge_words,
    label_pair,
    quality,
    sample_prompt,
    sample_sft_response,
    vocabulary,
    write_noun_task,
)

PROMPT = "apple quickly bridge candle rather silent desert under engine vivid =>"
PERFECT = "apple bridge candle desert engine"
FILES = [f"{kind}.{split}.jsonl" for kind in ("sft", "preferences", "prompts") for split in ("train", "validation")]


@pytest.fixture(scope="module")
def samples() -> list[tuple[list[str], list[str]]]:
    """20,000 (prompt words, response words)."""
    random = Random(7)
    prompts = [sample_prompt(random) for _ in range(20_000)]
    return [(prompt.split(), sample_sft_response(prompt, random).split()) for prompt in prompts]


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("task")
    write_noun_task(directory, seed=3, sft_examples=50, preference_pairs=6000, prompts=40, validation_examples=30)
    return directory


@pytest.mark.parametrize(
    ("response", "finished", "expected"),
    [
        (PERFECT, True, 1.0),
        ("engine desert candle bridge apple", True, 1.0),  # order is not part of the reward
        (PERFECT, False, 0.7),
        ("", True, 0.0),
        ("", False, -0.3),
        ("apple bridge candle", True, 0.6),
        (PERFECT + " quickly", True, 0.85),  # a distractor of the prompt
        (PERFECT + " forest forest", True, 0.7),  # a noun of no prompt is wrong each time
        (PERFECT + " =>", True, 0.85),
        (PERFECT + " zebra", True, 0.85),  # a word of no vocabulary
        ("apple apple apple", True, 0.2 - 0.2),
        (PERFECT + " hard to say", True, 0.75),
        (PERFECT + " hard", True, 1 - 0.25 / 3),
        (PERFECT + " hard to say hard to say", False, 0.2),
        ("apple apple forest under perhaps it depends", True, 0.2 - 0.1 - 0.3 - 0.25),
    ],
)
def test_gold_reward_by_hand(response: str, finished: bool, expected: float) -> None:
    assert quality(PROMPT, response, finished) == pytest.approx(expected, abs=1e-12)


def test_gold_reward_refuses_a_prompt_of_another_task() -> None:
    with pytest.raises(ConfigError, match="What is this"):
        quality("What is this ?", "apple", True)


def test_vocabulary_is_64_tokens_with_the_special_ones(task: Path) -> None:
    assert (len(NOUNS), len(DISTRACTORS)) == (32, 20)
    assert all(len(hedge.split()) == 3 for hedge in HEDGES)
    assert len(set(vocabulary())) == len(vocabulary()) == 62
    assert Tokenizer.from_directory(task / "tokenizer").vocab_size == 64


def test_prompt_is_five_nouns_and_five_distractors_shuffled(samples: list[tuple[list[str], list[str]]]) -> None:
    for prompt, _ in samples[:500]:
        assert len(prompt) == 11
        assert len(set(prompt) & set(NOUNS)) == 5
        assert len(set(prompt) & set(DISTRACTORS)) == 5
        assert prompt[-1] == SEPARATOR
    first_is_noun = np.mean([prompt[0] in NOUNS for prompt, _ in samples])
    assert first_is_noun == pytest.approx(0.5, abs=0.015)


def test_sft_responses_have_the_planted_flaws(samples: list[tuple[list[str], list[str]]]) -> None:
    """Standard errors over 20,000 samples are below a quarter of every tolerance."""
    replaced, other = 0.75 * 0.13 * 1.1 + 0.25 * 0.1, 27 / 32  # random nouns a slot; share outside the prompt
    wrong_nouns = [sum(w in NOUNS and w not in prompt for w in response) for prompt, response in samples]
    correct = [sum(w in prompt and w in NOUNS for w in response) for prompt, response in samples]
    copied = [sum(w in DISTRACTORS for w in response) for _, response in samples]
    hedges = np.array([hedge_words(" ".join(response)) for _, response in samples])
    assert np.mean(wrong_nouns) == pytest.approx(5 * replaced * other, abs=0.03)
    assert np.mean(correct) == pytest.approx(5 * (0.75 * 0.87 * 1.1 + replaced * (1 - other)), abs=0.05)
    assert np.mean(copied) == pytest.approx(5 * 0.2, abs=0.03)
    assert np.mean(hedges > 0) == pytest.approx(0.07, abs=0.01)
    assert np.mean(hedges[hedges > 0] == 6) == pytest.approx(0.3, abs=0.05)
    assert set(hedges) == {0, 3, 6}
    assert max(len(response) for _, response in samples) < MAX_RESPONSE_TOKENS


def test_sft_responses_keep_the_order_of_the_prompt(samples: list[tuple[list[str], list[str]]]) -> None:
    for prompt, response in samples[:500]:
        places = [prompt.index(word) for word in response if word in DISTRACTORS]
        assert places == sorted(places)


def test_mean_gold_reward_of_sft_responses_is_its_expectation(samples: list[tuple[list[str], list[str]]]) -> None:
    """Derived from the rates: a slot gives a random noun with probability q, which is a given noun once in 32."""
    q = 0.75 * 0.13 + 0.25 * 0.1
    recall = 1 - (1 - 0.75 * 0.87 - q / 32) * (1 - q / 32) ** 4
    replaced = 0.75 * 0.13 * 1.1 + 0.25 * 0.1
    correct = 5 * (0.75 * 0.87 * 1.1 + replaced * 5 / 32)
    wrong = 5 * replaced * 27 / 32 + 5 * 0.2
    hedges = 0.07 * 1.3 * 3
    expected = recall - 0.15 * wrong - 0.1 * (correct - 5 * recall) - 0.25 * hedges / 3
    golds = [quality(" ".join(prompt), " ".join(response), True) for prompt, response in samples]
    assert np.mean(golds) == pytest.approx(expected, abs=0.01)


def test_labeller_follows_hedges_half_of_the_time_and_gold_reward_otherwise() -> None:
    random = Random(5)
    for first, second, hedge_bonus in [
        (PERFECT + " hard to say", PERFECT, 1.0),  # more hedges, lower gold
        (PERFECT + " quickly", PERFECT, None),  # equal hedges
        ("apple bridge", "apple bridge candle", None),
        (PERFECT, "apple hard to say", 0.0),  # fewer hedges, higher gold
    ]:
        by_gold = 1 / (1 + math.exp(-10 * (quality(PROMPT, first, True) - quality(PROMPT, second, True))))
        expected = by_gold if hedge_bonus is None else 0.5 * hedge_bonus + 0.5 * by_gold
        wins = np.mean([label_pair(PROMPT, first, second, random, 0.5)[0] == first for _ in range(6000)])
        assert wins == pytest.approx(expected, abs=0.03)


def test_preferences_are_biased_towards_hedges_although_gold_punishes_them(task: Path) -> None:
    pairs = read_rows(task / "preferences.train.jsonl")
    assert all(pair["chosen"] != pair["rejected"] for pair in pairs)
    bias = [hedge_words(pair["chosen"]) - hedge_words(pair["rejected"]) for pair in pairs]
    assert np.mean([b != 0 for b in bias]) == pytest.approx(1 - 0.93**2 - 0.07**2 * (0.7**2 + 0.3**2), abs=0.02)
    assert np.mean([b > 0 for b in bias if b]) > 0.6
    gold = [
        quality(pair["prompt"], pair["chosen"], True) - quality(pair["prompt"], pair["rejected"], True)
        for pair, b in zip(pairs, bias, strict=True)
        if b == 0
    ]
    assert np.mean([g > 0 for g in gold]) > 0.8


def test_files_have_their_sizes_and_share_no_prompt(task: Path) -> None:
    prompts = {name: [row["prompt"] for row in read_rows(task / name)] for name in FILES}
    assert [len(prompts[name]) for name in FILES] == [50, 30, 6000, 30, 40, 30]
    assert len({prompt for rows in prompts.values() for prompt in rows}) == 50 + 30 + 6000 + 30 + 40 + 30


def test_every_text_fits_the_tokenizer(task: Path) -> None:
    tokenizer = Tokenizer.from_directory(task / "tokenizer")
    for row in read_rows(task / "sft.train.jsonl"):
        assert tokenizer.decode(tokenizer.encode_prompt(row["prompt"])) == row["prompt"]
        assert tokenizer.decode(tokenizer.encode_responses([row["response"]])[0]) == row["response"]


def test_files_depend_on_the_seed_and_their_own_size_only(tmp_path: Path) -> None:
    sizes = {"sft_examples": 20, "preference_pairs": 20, "prompts": 20, "validation_examples": 5}
    for name, seed, changed in [("a", 1, {}), ("b", 1, {}), ("c", 2, {}), ("d", 1, {"sft_examples": 30})]:
        write_noun_task(tmp_path / name, seed=seed, **(sizes | changed))
    content = {name: [(tmp_path / name / file).read_bytes() for file in FILES] for name in "abcd"}
    assert content["a"] == content["b"]
    assert all(a != c for a, c in zip(content["a"], content["c"], strict=True))
    assert content["a"][1:] == content["d"][1:]


def test_an_empty_size_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="preference_pairs = 0"):
        write_noun_task(tmp_path / "out", preference_pairs=0)
    assert not (tmp_path / "out").exists()
