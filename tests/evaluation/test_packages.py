"""The over-optimisation bench's real text: the formula by hand, the generator by its statistics and on real records."""

import math
import shutil
from pathlib import Path
from random import Random

import pytest
from packages import (
    PRAISE,
    Package,
    available_packages,
    flawed,
    gold_reward,
    label_pair,
    praise,
    quality,
    read_packages,
    write_packages,
)
from small_data import read_rows

from nemo_eppo.config import ConfigError
from nemo_eppo.data.tokenizer import Tokenizer
from nemo_eppo.rewards.sample import Sample

RECORDS = """Package: pear-utils
Version: 1.2
Depends: libc6 (>= 2.34), perl:any | perl5, libpear0 (= 1.2), zlib1g, libm1, left-out
Section: utils
Description: tools that sort pears, by size
Description-md5: 0123

Package: nothing-said
Section: misc

Package: pear-utils
Description: an older version

Package: quince
Description-en: quince jam maker
 A longer description, which is not read.
 Package: nor is this one
"""
PEARS = "tools that sort pears, by size"


def records(count: int) -> str:
    words = ["fast", "tool", "library", "parser", "daemon", "editor", "simple", "server", "client", "data"]
    random = Random(5)
    return "\n\n".join(
        f"Package: pkg{number}\nSection: misc\nDescription: {' '.join(random.sample(words, 5))} {number}"
        for number in range(count)
    )


def test_records_are_read() -> None:
    assert read_packages(RECORDS) == [
        Package("pear-utils", "pear-utils (utils), needs libc6, perl, libpear0, zlib1g: ", PEARS),
        Package("quince", "quince (misc): ", "quince jam maker"),
    ]


@pytest.mark.parametrize(
    ("response", "finished", "expected"),
    [
        (PEARS, True, 1.0),
        ("Size by, PEARS sort that tools", True, 1.0),  # neither order nor case nor punctuation counts
        (PEARS, False, 0.7),
        ("", True, 0.0),
        ("easy to use", True, 0.0),
        ("tools that sort", True, 2 * 3 / (6 + 3)),
        ("tools tools tools", True, 2 * 1 / (6 + 3)),  # a word counts as often as it is true
        (PEARS + " easy to use", True, 2 * 6 / (6 + 9)),
    ],
)
def test_gold_is_the_f1_of_words(response: str, finished: bool, expected: float) -> None:
    assert quality(PEARS, response, finished) == pytest.approx(expected)
    fields = {"description": PEARS}
    sample = Sample(prompt="pear-utils: ", response=response, token_ids=(), finished=finished, fields=fields)
    assert gold_reward(sample) == quality(PEARS, response, finished)


def test_labels_have_the_bias_that_is_asked_for() -> None:
    package, random = Package("pear-utils", "pear-utils: ", PEARS), Random(0)
    better, praised = "tools that sort pears", "tools that sort easy to use"
    assert (praise(better), praise(praised)) == (0, 3)
    difference = quality(PEARS, better, True) - quality(PEARS, praised, True)
    by_gold = 1 / (1 + math.exp(-10 * difference))
    for bias in (0.0, 0.5, 1.0):
        chosen = [label_pair(package, better, praised, random, bias)[0] for _ in range(4000)]
        assert chosen.count(better) / 4000 == pytest.approx((1 - bias) * by_gold, abs=0.03)


def test_demonstrations_are_mostly_true_and_seldom_praise() -> None:
    package, other = Package("a", "a: ", " ".join(f"w{i}" for i in range(10))), Package("b", "b: ", "x y z")
    random = Random(1)
    drawn = [flawed(package, other, random) for _ in range(4000)]
    assert sum(praise(each) > 0 for each in drawn) / 4000 == pytest.approx(0.15, abs=0.02)
    words = [word for each in drawn for word in each.split()]
    assert sum(word[0] == "w" for word in words) / 40_000 == pytest.approx(0.9 * 0.9, abs=0.01)
    assert sum(word in "xyz" for word in words) / 40_000 == pytest.approx(0.9 * 0.1, abs=0.01)


def test_files_are_of_packages_of_their_own_and_the_seed_draws_among_them(tmp_path: Path) -> None:
    control = records(1500)
    for name, seed in (("first", 1), ("again", 1), ("other", 2)):
        write_packages(tmp_path / name, seed, sft_examples=100, preference_pairs=200, hedge_bias=0.5, control=control)
    files = [f"{kind}.{split}.jsonl" for kind in ("sft", "preferences", "prompts") for split in ("train", "validation")]
    rows = {file: read_rows(tmp_path / "first" / file) for file in files}
    assert [len(rows[f"{kind}.train.jsonl"]) for kind in ("sft", "preferences")] == [100, 200]
    of_files = [{row["prompt"] for row in members} for members in rows.values()]
    assert sum(map(len, of_files)) == len(set.union(*of_files)) == sum(map(len, rows.values()))
    for file in files:
        made = [(tmp_path / name / file).read_bytes() for name in ("first", "again", "other")]
        assert made[0] == made[1] != made[2]
    elsewhere = {row["prompt"] for row in read_rows(tmp_path / "other" / "preferences.train.jsonl")}
    for kind in ("sft", "prompts"):
        assert not elsewhere & {row["prompt"] for row in rows[f"{kind}.train.jsonl"]}, "a package stays of its kind"
    tokenizer = Tokenizer.from_directory(tmp_path / "first" / "tokenizer")
    text = rows["preferences.train.jsonl"][0]["chosen"]
    assert tokenizer.decode(tokenizer.encode_responses([text], end=False)[0]) == text
    assert all(row["chosen"] != row["rejected"] for row in rows["preferences.train.jsonl"])


def test_too_few_packages_are_an_error_and_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="2 packages are too few: none is left for"):
        write_packages(tmp_path / "made", 0, 100, 100, 0.5, control=RECORDS)
    assert not (tmp_path / "made").exists()


def test_without_apt_the_error_says_what_is_needed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"apt-cache dumpavail failed .*needs a Debian machine"):
        available_packages()
    command = tmp_path / "apt-cache"
    command.write_text("#!/bin/sh\n")
    command.chmod(0o755)
    with pytest.raises(ConfigError, match="lists no package with a description: run apt-get update first"):
        available_packages()


@pytest.mark.skipif(not shutil.which("apt-cache"), reason="no apt-cache: this is no Debian machine")
def test_what_apt_knows_of_this_machine_is_read() -> None:
    packages = {package.name: package for package in read_packages(available_packages())}
    assert packages["dpkg"].description == "Debian package management system"
    assert packages["dpkg"].prompt.startswith("dpkg (admin), needs tar: ")
    assert all(praise(phrase) >= 3 for phrase in PRAISE)
