"""Terms that read the response itself: repeated n-grams, and patterns that its text has to hold to."""

from random import Random
from typing import Any

import pytest
from test_reward_pipeline import B, make_inputs, pipeline

from nemo_eppo.config import ConfigError
from nemo_eppo.rewards.sample import Sample


def samples(*responses: str, token_ids: list[tuple[int, ...]] | None = None) -> list[Sample]:
    ids = token_ids or [(1,)] * len(responses)
    return [
        Sample(prompt="p", response=text, token_ids=tokens, finished=True)
        for text, tokens in zip(responses, ids, strict=True)
    ]


def paid(settings: dict[str, Any], given: list[Sample]) -> list[float]:
    [(name, _)] = settings.items()
    result = pipeline(settings)(make_inputs(samples=given))
    return [float(value) for value in result.ledger.contributions[f"reward/{name}"]]


@pytest.mark.parametrize("ngram", [1, 2, 4])
def test_repetition_costs_the_share_of_ngrams_that_stood_before(ngram: int) -> None:
    random = Random(ngram)
    token_ids = [tuple(random.choices(range(2), k=length)) for length in (1, 3, 4, 9, 20)] + [tuple(range(10))]
    expected: list[float] = []
    for tokens in token_ids:
        seen: list[list[int]] = []
        again = total = 0
        for start in range(len(tokens)):
            if start + ngram <= len(tokens):
                words = [tokens[start + offset] for offset in range(ngram)]
                again, total = again + (words in seen), total + 1
                seen.append(words)
        expected.append(-0.5 * again / total if total else 0.0)
    assert len(token_ids) == B
    found = paid({"repetition": {"coefficient": 0.5, "ngram": ngram}}, samples(*[""] * B, token_ids=token_ids))
    assert found == pytest.approx(expected)
    assert found[-1] == 0
    assert min(found) < 0


def test_a_format_is_required_and_a_language_forbidden() -> None:
    given = samples("<think>a\nb</think> yes", "yes", "<think>a</think> \u662f", "\u662f", "", "said: <think>a</think>")
    settings = {"require": r"^<think>.*</think>", "forbid": "[\u4e00-\u9fff]", "penalty": 0.25}
    assert paid({"response_format": settings}, given) == pytest.approx([0.0, -0.25, -0.25, -0.5, -0.25, -0.25])
    only = {"forbid": "[\u4e00-\u9fff]", "penalty": 2.0}
    assert paid({"response_format": only}, given) == pytest.approx([0.0, 0.0, -2.0, -2.0, 0.0, 0.0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"require": "(", "penalty": 1.0}, r"response_format\.require = '\(': expected a regular expression"),
        ({"forbid": "[a-", "penalty": 1.0}, r"response_format\.forbid = '\[a-': expected a regular expression"),
        ({"require": "x"}, "penalty 0.0 with require 'x', forbid None: set a penalty and at least one pattern"),
        ({"penalty": 1.0}, "set a penalty and at least one pattern, or neither"),
    ],
)
def test_formats_that_cannot_work_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        pipeline({"response_format": settings})
    with pytest.raises(ConfigError, match=r"repetition\.ngram = 0"):
        pipeline({"repetition": {"ngram": 0}})
