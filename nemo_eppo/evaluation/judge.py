"""`nemo-eppo judge`: how often one model's responses are better than another's, by a judge or a gold reward."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator
from tqdm import tqdm

from nemo_eppo.config import Config, ConfigError, RunError
from nemo_eppo.data.jsonl import json_line
from nemo_eppo.evaluation.judge_client import Answer, Endpoint, EndpointConfig, Question
from nemo_eppo.evaluation.judge_report import Judged, Outcome, write_judgement
from nemo_eppo.evaluation.pairs import Pair, read_pairs
from nemo_eppo.evaluation.rows_file import RowsFile
from nemo_eppo.files import directory_made_whole
from nemo_eppo.observability.run import LOCK, hold
from nemo_eppo.rewards.functions import FunctionPool, check_function
from nemo_eppo.rewards.sample import Sample
from nemo_eppo.settings.rewards import FunctionsConfig

_ANSWER_TOKENS = 80  # of a verdict with two sentences; models that reason first need more
_EQUAL = 1e-9  # gold rewards that differ by less are those of a tie
_SEEN_FROM: dict[str, Outcome] = {"first": "win", "second": "lose", "tie": "tie"}
_REVERSED: dict[Outcome, Outcome] = {"win": "lose", "lose": "win", "tie": "tie"}


class JudgeConfig(Config):
    """Settings of `nemo-eppo judge`."""

    responses: dict[str, Path] = Field(min_length=1)
    """Files of responses, by the name of what made them."""
    baseline: Path | None = None
    """File of the responses that all others are compared with; None for files that have both (see `read_pairs`)."""
    output: Path
    """Directory for verdicts.jsonl, summary.json, report.html and report.png."""
    judge: Literal["endpoint", "gold"] = "endpoint"
    """Who decides: a model behind an endpoint, or a gold reward function."""
    gold: str | None = None
    """Gold reward function, "module:function"."""
    endpoint: EndpointConfig | None = None
    """Where the judge is asked."""

    @model_validator(mode="after")
    def _has_its_judge(self) -> "JudgeConfig":
        if (self.judge == "gold") != (self.gold is not None):
            raise ValueError("--gold MODULE:FUNCTION goes with --judge gold, and --judge gold with --gold")
        if (self.judge == "endpoint") != (self.endpoint is not None):
            raise ValueError("--model MODEL goes with the judge of an endpoint, which needs it")
        return self


class GoldJudging:
    """Lets a gold reward function decide: the response with the higher reward wins.

    Creating it checks the function, every row and the output directory.

    Raises:
        ConfigError: one of them is bad.
    """

    def __init__(self, config: JudgeConfig) -> None:
        assert config.gold is not None
        self.config, self._gold = config, config.gold
        check_function("--gold", config.gold)
        self._pairs = {name: read_pairs(path, config.baseline) for name, path in config.responses.items()}

    def run(self) -> str:
        """Judge all pairs, write the output directory, which is complete or absent, and return the results as text."""
        pool = FunctionPool(FunctionsConfig())
        try:
            with directory_made_whole(self.config.output) as directory:
                judged = {name: self._judge(pool, pairs) for name, pairs in self._pairs.items()}
                return write_judgement(directory, judged, {"judge": "gold", "gold": self._gold}, self.config.baseline)
        finally:
            pool.close()

    def _judge(self, pool: FunctionPool, pairs: Sequence[Pair]) -> list[Judged]:
        def rewards(samples: Sequence[Sample]) -> list[float]:
            return pool.submit(self._gold, samples).result()

        responses, baselines = zip(*pairs, strict=True)
        judged = []
        for pair, response, baseline in zip(pairs, rewards(responses), rewards(baselines), strict=True):
            better: Outcome = "win" if response > baseline else "lose"
            outcome: Outcome = "tie" if math.isclose(response, baseline, rel_tol=_EQUAL, abs_tol=_EQUAL) else better
            judged.append(Judged(pair, outcome, (), {"gold_response": response, "gold_baseline": baseline}))
        return judged


class EndpointJudging:
    """Asks a model for every pair twice, with the responses in both orders.

    A pair is won, or lost, if both orders say so; otherwise it is a tie (the conservative rule of MT-Bench, arXiv
    2306.05685). Equal responses are a tie that nobody is asked about. Answers are kept one by one in answers.jsonl of
    the output directory: a question that was answered is never asked again, by this command or the next.

    Creating it checks the key, every row and the output directory, and sends nothing.

    Raises:
        ConfigError: one of them is bad, or another judge made the directory.
    """

    def __init__(self, config: JudgeConfig) -> None:
        assert config.endpoint is not None
        self.config = config
        self._settings = config.endpoint.model_dump(include={"model", "question", "temperature"})
        self._endpoint = Endpoint(config.endpoint)
        self._pairs = {name: read_pairs(path, config.baseline) for name, path in config.responses.items()}
        path = config.output / "answers.jsonl"
        if config.output.exists():
            there = {file.name for file in config.output.iterdir()} if config.output.is_dir() else {config.output.name}
            if there - {LOCK} and not path.is_file():
                raise ConfigError(
                    f"--output: {config.output} exists, but no judge of an endpoint made it; choose another"
                )
        hold(config.output)
        self._file = RowsFile(path, "judge", self._settings)
        self._answers = {row.pop("key"): Answer(**row) for row in self._file.rows()}
        asked = (question for pairs in self._pairs.values() for pair in pairs for question in _questions(pair))
        self.open_questions = [q for q in dict.fromkeys(asked) if q.key not in self._answers]
        """Questions without an answer, each once."""

    def cost(self) -> str:
        """Say how much is still to be asked, and what it may cost by the prices."""
        asked, count = self._endpoint.config, len(self.open_questions)
        most, price_in, price_out = asked.max_tokens, asked.price_in, asked.price_out
        tokens_in, tokens_out = self._endpoint.tokens(self.open_questions), count * _ANSWER_TOKENS
        told = f"{count:,} questions to {asked.model}: about {tokens_in:,} tokens in, {tokens_out:,} out"
        if price_in is None or price_out is None:
            return f"{told}; its cost is not known without --price-in and --price-out"
        spent = [(tokens_in * price_in + out * price_out) / 1e6 for out in (tokens_out, count * most)]
        return f"{told}; cost about {spent[0]:.2f}, and {spent[1]:.2f} if every answer has {most:,} tokens"

    def run(self) -> str:
        """Ask what is open, write the results, and return them as text.

        Raises:
            RunError: a question got no verdict. All answers so far are kept.
        """
        self._file.begin()
        if self.open_questions:
            with tqdm(total=len(self.open_questions), unit="question", disable=None) as bar:
                try:
                    self._endpoint.ask(self.open_questions, self._keeper(bar.update))
                except RunError as error:
                    raise RunError(
                        f"{error}\n{len(self._answers):,} answers are kept in {self._file.path}; the same command asks "
                        "only what is missing"
                    ) from None
        judged = {name: [self._judge(pair) for pair in pairs] for name, pairs in self._pairs.items()}
        kept = self._answers.values()
        judge = {"judge": "endpoint", **self._settings}
        judge |= {name: sum(getattr(answer, name) for answer in kept) for name in ("tokens_in", "tokens_out")}
        return write_judgement(self.config.output, judged, judge, self.config.baseline)

    def _keeper(self, advance: Callable[[int], object]) -> Callable[[Question, Answer], None]:
        def keep(question: Question, answer: Answer) -> None:
            self._answers[question.key] = answer
            self._file.append([json_line({"key": question.key, **answer._asdict()})])
            advance(1)

        return keep

    def _judge(self, pair: Pair) -> Judged:
        questions = _questions(pair)
        if not questions:
            return Judged(pair, "tie", (), {"equal": True})
        answers = [self._answers[question.key] for question in questions]
        first, second = (_SEEN_FROM[answer.verdict] for answer in answers)
        orders = (first, _REVERSED[second])
        details = {
            "shown_first": orders[0],
            "shown_second": orders[1],
            "reasons": [answer.reason for answer in answers],
        }
        return Judged(pair, first if orders[0] == orders[1] else "tie", orders, details)


def _questions(pair: Pair) -> tuple[Question, ...]:
    """Return both orders, the response first; nothing for equal responses."""
    texts = pair.response.response, pair.baseline.response
    if texts[0] == texts[1]:
        return ()
    return Question(pair.response.prompt, *texts), Question(pair.response.prompt, *texts[::-1])
