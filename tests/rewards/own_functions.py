"""Reward functions as a user would write them, for the tests of this folder and of training."""

import itertools
import os
import time

from nemo_eppo.rewards.sample import Sample

_calls = itertools.count(1)


def length(sample: Sample) -> float:
    print("what a function prints disturbs nobody")
    return float(len(sample.token_ids))


def matches(sample: Sample) -> bool:
    return bool(sample.finished and sample.response == sample.fields["answer"])


def starts_with(sample: Sample) -> bool:
    return sample.token_ids[:2] == (4, 5)


def huge(sample: Sample) -> int:
    return 10**400


def raises(sample: Sample) -> float:
    raise KeyError("no such answer")


def not_a_number(sample: Sample) -> str:
    return "good"


def nan(sample: Sample) -> float:
    return float("nan")


def dies(sample: Sample) -> float:
    os._exit(3)


def hangs_on_b(sample: Sample) -> float:
    if sample.prompt == "b":
        if os.fork() == 0:  # a child that lives longer holds the pipes open
            time.sleep(90)
            os._exit(0)
        time.sleep(600)
    return 1.0


def process(sample: Sample) -> int:
    return os.getpid()


def rank(sample: Sample) -> int:
    return int(os.environ["RANK"])


def fails_at_the_17th(sample: Sample) -> float:
    if next(_calls) == 17:
        raise ConnectionError("502 Bad Gateway")
    return float(sum(sample.token_ids) % 7)
