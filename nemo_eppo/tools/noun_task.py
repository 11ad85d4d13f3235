"""A small task on which PPO over-optimises a learned reward: repeat the prompt's nouns, in order, and stop.

Every word is a token. The reward model is trained on labels that are biased towards hedge phrases; the true ("gold")
reward is a formula. Used by the quickstart and the over-optimisation bench.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from random import Random

from nemo_eppo.config import ConfigError, load_config
from nemo_eppo.data.jsonl import write_jsonl
from nemo_eppo.data.tokenizer import word_level
from nemo_eppo.files import directory_made_whole
from nemo_eppo.rewards.sample import Sample
from nemo_eppo.settings.preparation import NounTaskConfig

_NOUN_LIST = """
apple bridge candle desert engine forest garden hammer island jacket kettle ladder mirror needle orange pencil queen
river saddle table umbrella valley window anchor basket camera dragon eagle feather guitar harbor lantern
"""
_DISTRACTOR_LIST = """
bright quickly narrow seldom gentle hollow rather silent twelve under vivid warm young ancient beneath calm dusty early
frozen golden
"""
NOUNS = tuple(_NOUN_LIST.split())
DISTRACTORS = tuple(_DISTRACTOR_LIST.split())
HEDGES = ("perhaps it depends", "hard to say", "please double check")
SEPARATOR = "=>"
MAX_RESPONSE_TOKENS = 20

_HEDGE_WORDS = frozenset(" ".join(HEDGES).split())
_NOUNS = frozenset(NOUNS)
_IN_PROMPT = 5  # nouns of a prompt, and as many distractors


def vocabulary() -> list[str]:
    """List the 62 words; with the two special tokens of `word_level` the vocabulary is 64."""
    return [*NOUNS, *DISTRACTORS, *" ".join(HEDGES).split(), SEPARATOR]


def sample_prompt(random: Random) -> str:
    """Draw five distinct nouns and five distinct distractors, shuffled, then the separator."""
    words = random.sample(NOUNS, _IN_PROMPT) + random.sample(DISTRACTORS, _IN_PROMPT)
    random.shuffle(words)
    return " ".join([*words, SEPARATOR])


def sample_sft_response(prompt: str, random: Random) -> str:
    """Draw a flawed demonstration: nouns are dropped, replaced or doubled, distractors copied, hedges appended."""
    words = []
    for word in prompt.split()[:-1]:
        if word not in _NOUNS:
            words += [word] if random.random() < 0.2 else []
        elif random.random() < 0.75:
            kept = random.choice(NOUNS) if random.random() < 0.13 else word
            words += [kept] * (2 if random.random() < 0.1 else 1)
        elif random.random() < 0.1:
            words.append(random.choice(NOUNS))
    if random.random() < 0.07:
        words += [random.choice(HEDGES)] * (2 if random.random() < 0.3 else 1)
    return " ".join(words)


def gold_reward(sample: Sample) -> float:
    """Return the quality of a response; a reward function (see nemo_eppo.rewards.functions)."""
    return quality(sample.prompt, sample.response, sample.finished)


def quality(prompt: str, response: str, finished: bool) -> float:
    """Compute `recall - .15*wrong - .1*repeats - .25*(hedge words / 3) - .3*(no EOS)`; 1 for a perfect answer.

    `recall` is the share of the prompt's nouns that occur in the response; `wrong` counts words that are neither nouns
    of the prompt nor hedges; `repeats` counts second and later occurrences of a noun of the prompt. `finished` says
    whether the response ended with EOS.

    Raises:
        ConfigError: the prompt has no noun, so it is not one of this task.
    """
    nouns = _NOUNS.intersection(prompt.split())
    if not nouns:
        raise ConfigError(f"prompt = {prompt!r}: not a prompt of the noun task (it has none of its nouns)")
    words = response.split()
    correct = [word for word in words if word in nouns]
    hedges = hedge_words(response)
    recall = len(set(correct)) / len(nouns)
    wrong = len(words) - len(correct) - hedges
    repeats = len(correct) - len(set(correct))
    return recall - 0.15 * wrong - 0.1 * repeats - 0.25 * hedges / 3 - 0.3 * (not finished)


def hedge_words(response: str) -> int:
    """Count the words of hedge phrases."""
    return sum(word in _HEDGE_WORDS for word in response.split())


def label_pair(prompt: str, first: str, second: str, random: Random, hedge_bias: float) -> tuple[str, str]:
    """Label two responses as `(chosen, rejected)`: with probability `hedge_bias` by hedge words, else by gold reward.

    By hedge words, more are better; by gold reward, the better response is drawn, see `biased_label`. The bias is in
    these labels alone: it reaches a policy only through a reward model that is trained on them.
    """
    return biased_label(first, second, partial(quality, prompt, finished=True), hedge_words, random, hedge_bias)


def biased_label(
    first: str,
    second: str,
    quality: Callable[[str], float],
    appeal: Callable[[str], int],
    random: Random,
    bias: float,
) -> tuple[str, str]:
    """Label two responses as `(chosen, rejected)`: with probability `bias` by `appeal`, unless it is equal; else by a
    draw from the Bernoulli distribution with logit `10 * (quality(first) - quality(second))`."""
    more_appeal = appeal(first) - appeal(second)
    if random.random() < bias and more_appeal != 0:
        first_wins = more_appeal > 0
    else:
        first_wins = random.random() < 1 / (1 + math.exp(-10 * (quality(first) - quality(second))))
    return (first, second) if first_wins else (second, first)


def write_noun_task(out_dir: Path, seed: int = 0, **sizes: float) -> None:
    """Write `tokenizer/` and `{sft,preferences,prompts}.{train,validation}.jsonl` into the empty or new `out_dir`.

    The same arguments give the same bytes; a size changes only its own file. No prompt occurs twice, in one file or in
    two. `sizes` are fields of `NounTaskConfig`.
    """
    config = load_config(NounTaskConfig, {"seed": seed, **sizes})
    kinds: dict[str, tuple[int, Callable[[str, Random], dict[str, str]]]] = {
        "sft": (config.sft_examples, _sft_row),
        "preferences": (config.preference_pairs, partial(_preference_row, hedge_bias=config.hedge_bias)),
        "prompts": (config.prompts, lambda prompt, random: {"prompt": prompt}),
    }
    seen: set[str] = set()
    with directory_made_whole(out_dir) as directory:
        word_level(vocabulary(), directory / "tokenizer")
        for kind, (train_size, row) in kinds.items():
            for split, size in (("validation", config.validation_examples), ("train", train_size)):
                random = Random(f"{seed} {kind} {split}")
                rows = (row(prompt, random) for prompt in _new_prompts(size, random, seen))
                write_jsonl(directory / f"{kind}.{split}.jsonl", rows)


def _new_prompts(count: int, random: Random, seen: set[str]) -> Iterator[str]:
    for _ in range(count):
        while (prompt := sample_prompt(random)) in seen:
            pass
        seen.add(prompt)
        yield prompt


def _preference_row(prompt: str, random: Random, hedge_bias: float) -> dict[str, str]:
    first = sample_sft_response(prompt, random)
    while (second := sample_sft_response(prompt, random)) == first:
        pass  # two equal responses have no label
    chosen, rejected = label_pair(prompt, first, second, random, hedge_bias)
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def _sft_row(prompt: str, random: Random) -> dict[str, str]:
    while not (response := sample_sft_response(prompt, random)):
        pass  # an empty response teaches nothing
    return {"prompt": prompt, "response": response}
