"""`nemo-eppo judge`: how often one model's responses are better than another's, by a judge or a gold reward."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import asdict
from itertools import chain
from typing import Any

from nemo_eppo.config import ConfigError, RunError
from nemo_eppo.evaluation.judge_client import Answer, Endpoint, Question, key_of
from nemo_eppo.evaluation.judge_report import Judged, Outcome, write_judgement
from nemo_eppo.evaluation.pairs import Pair, read_pairs
from nemo_eppo.evaluation.rows_file import RowsFile
from nemo_eppo.evaluation.rows_progress import rows_progress
from nemo_eppo.files import json_line
from nemo_eppo.observability.run import LOCK, hold
from nemo_eppo.rewards.functions import FunctionPool, check_function, source_sha256
from nemo_eppo.settings.evaluation import JudgeConfig
from nemo_eppo.settings.rewards import FunctionsConfig

_ANSWER_TOKENS = 80  # of a verdict with two sentences; models that reason first need more
_EQUAL = 1e-9  # gold rewards that differ by less are equal
_OF_FIRST: dict[str, Outcome] = {"first": "win", "second": "lose", "tie": "tie"}  # for the response shown first
_REVERSED: dict[Outcome, Outcome] = {"win": "lose", "lose": "win", "tie": "tie"}


class Judging(ABC):
    """Judges pairs by answers to questions about them.

    Every answer is saved at once in answers.jsonl of the output directory: no question is asked twice, by this command
    or the next. Creating it checks every row and the output directory, and asks nothing.

    Args:
        settings: settings that the answers depend on.

    Raises:
        ConfigError: a row is bad, or the output directory is not of the same judge.
    """

    def __init__(self, config: JudgeConfig, settings: Mapping[str, Any]) -> None:
        self.config = config
        self._pairs = {name: read_pairs(path, config.baseline) for name, path in config.responses.items()}
        path = config.output / "answers.jsonl"
        if config.output.exists():
            names = {file.name for file in config.output.iterdir()} if config.output.is_dir() else {config.output.name}
            if names - {LOCK} and not path.is_file():
                raise ConfigError(f"--output: {config.output} exists, but no judge made it; choose another")
        hold(config.output)
        self._file = RowsFile(path, "judge", settings)
        self._answers = {row.pop("key"): row for row in self._file.rows()}
        questions: dict[str, Any] = {}
        for pair in chain(*self._pairs.values()):
            questions |= self._questions(pair)
        self.open_questions = {key: question for key, question in questions.items() if key not in self._answers}
        """Questions without an answer, each once, by their keys (see `key_of`)."""

    @abstractmethod
    def _questions(self, pair: Pair) -> dict[str, Any]:
        """Return the questions about a pair, by their keys."""

    @abstractmethod
    def _ask(self, keep: Callable[[str, Mapping[str, Any]], None]) -> None:
        """Pass key and answer of every open question to `keep`; RunError if a question gets no answer."""

    @abstractmethod
    def _judge(self, pair: Pair) -> Judged:
        """Decide a pair by the answers."""

    @abstractmethod
    def _description(self) -> dict[str, Any]:
        """Describe the judge, for the results."""

    def run(self) -> str:
        """Ask the open questions, write the results, and return them as text.

        Raises:
            RunError: a question got no answer. All answers so far are saved.
        """
        self._file.begin()
        if self.open_questions:
            with rows_progress(len(self.open_questions), unit="answer") as add:
                try:
                    self._ask(self._keeper(add))
                except RunError as error:
                    raise RunError(
                        f"{error}\n{len(self._answers):,} answers are kept in {self._file.path}; the same command asks "
                        "only what is missing"
                    ) from None
        judged = {name: [self._judge(pair) for pair in pairs] for name, pairs in self._pairs.items()}
        judge = {"judge": "gold" if self.config.gold else "endpoint", **self._description()}
        return write_judgement(self.config.output, judged, judge, self.config.baseline)

    def _keeper(self, add: Callable[[int], None]) -> Callable[[str, Mapping[str, Any]], None]:
        def keep(key: str, answer: Mapping[str, Any]) -> None:
            self._answers[key] = dict(answer)
            self._file.append([json_line({"key": key, **answer})])
            add(1)

        return keep


class GoldJudging(Judging):
    """Lets a gold reward function decide: the response with the higher reward wins.

    Creating it checks the function too. If the function or its source file changes, it is another judge.
    """

    def __init__(self, config: JudgeConfig) -> None:
        assert config.gold is not None
        self._gold = config.gold
        check_function("--gold", self._gold)
        super().__init__(config, {"gold": self._gold, "source_sha256": source_sha256(self._gold)})

    def _questions(self, pair: Pair) -> dict[str, Any]:
        return {key_of(asdict(sample)): sample for sample in pair}

    def _ask(self, keep: Callable[[str, Mapping[str, Any]], None]) -> None:
        pool = FunctionPool(FunctionsConfig())
        try:
            for key, sample in self.open_questions.items():
                (reward,) = pool.submit(self._gold, [sample]).result()
                keep(key, {"reward": reward})
        finally:
            pool.close()

    def _judge(self, pair: Pair) -> Judged:
        response, baseline = (self._answers[key_of(asdict(sample))]["reward"] for sample in pair)
        better: Outcome = "win" if response > baseline else "lose"
        outcome: Outcome = "tie" if math.isclose(response, baseline, rel_tol=_EQUAL, abs_tol=_EQUAL) else better
        return Judged(pair, outcome, (), {"gold_response": response, "gold_baseline": baseline})

    def _description(self) -> dict[str, Any]:
        return {"gold": self._gold}


class EndpointJudging(Judging):
    """Asks a model for every pair twice, with the responses in both orders.

    A pair is won, or lost, if the verdicts in both orders agree; otherwise it is a tie (the conservative rule of
    MT-Bench, arXiv 2306.05685). Equal responses are a tie without a question. Creating it checks the API key too.
    """

    def __init__(self, config: JudgeConfig) -> None:
        assert config.endpoint is not None
        self._settings = config.endpoint.model_dump(include={"model", "question", "temperature"})
        self._endpoint = Endpoint(config.endpoint)
        super().__init__(config, self._settings)

    def cost(self) -> str:
        """Return, as text, the number of open questions, their tokens, and their cost by the prices."""
        endpoint, count = self._endpoint.config, len(self.open_questions)
        longest, price_in, price_out = endpoint.max_tokens, endpoint.price_in, endpoint.price_out
        tokens_in, tokens_out = self._endpoint.tokens(self.open_questions.values()), count * _ANSWER_TOKENS
        text = f"{count:,} questions to {endpoint.model}: about {tokens_in:,} tokens in, {tokens_out:,} out"
        if price_in is None or price_out is None:
            return f"{text}; its cost is not known without --price-in and --price-out"
        likely, largest = ((tokens_in * price_in + out * price_out) / 1e6 for out in (tokens_out, count * longest))
        return f"{text}; cost about {likely:.2f}, and {largest:.2f} if every answer has {longest:,} tokens"

    def _questions(self, pair: Pair) -> dict[str, Any]:
        """Return the questions in both orders, first that with the response first; none for equal responses."""
        prompt, texts = pair.response.prompt, (pair.response.response, pair.baseline.response)
        orders = (Question(prompt, *texts), Question(prompt, *texts[::-1])) if texts[0] != texts[1] else ()
        return {key_of(question): question for question in orders}

    def _ask(self, keep: Callable[[str, Mapping[str, Any]], None]) -> None:
        questions = self.open_questions.values()
        self._endpoint.ask(questions, lambda question, answer: keep(key_of(question), answer._asdict()))

    def _judge(self, pair: Pair) -> Judged:
        answers = [Answer(**self._answers[key]) for key in self._questions(pair)]
        if not answers:
            return Judged(pair, "tie", (), {"equal": True})
        first, second = (_OF_FIRST[answer.verdict] for answer in answers)
        orders = (first, _REVERSED[second])
        details = {
            "shown_first": orders[0],
            "shown_second": orders[1],
            "reasons": [answer.reason for answer in answers],
        }
        return Judged(pair, first if orders[0] == orders[1] else "tie", orders, details)

    def _description(self) -> dict[str, Any]:
        answers = self._answers.values()
        return self._settings | {name: sum(row[name] for row in answers) for name in ("tokens_in", "tokens_out")}
