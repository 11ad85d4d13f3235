"""The output files of `nemo-eppo judge`: verdicts.jsonl, summary.json, report.html and report.png."""

import html
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from nemo_eppo.data.jsonl import write_jsonl
from nemo_eppo.evaluation.intervals import Estimate, share_over_prompts
from nemo_eppo.evaluation.pairs import Pair
from nemo_eppo.files import write_atomically, write_json
from nemo_eppo.observability.charts import COLORS, GRAY, Bars, Chart, Lines, Series
from nemo_eppo.observability.pictures import write_picture
from nemo_eppo.observability.report_page import page, sample_card, section
from nemo_eppo.observability.report_tables import plain_table, text_table

Outcome = Literal["win", "tie", "lose"]
_OUTCOMES: dict[Outcome, str] = {"win": COLORS[2], "tie": GRAY, "lose": COLORS[1]}
_WORTH = {"win": 1.0, "tie": 0.5}
_PERCENT = "% of pairs"
_BARS = "Shares of the pairs, from the response's side."
_LINE = "Win + 0.5 tie; one half is as good as the baseline. The band is a 95% interval."
_SHOWN = 2  # pairs of each outcome and checkpoint on the page


class Judged(NamedTuple):
    """The decision about a pair."""

    pair: Pair
    outcome: Outcome
    """For the response, against the baseline."""
    orders: tuple[Outcome, ...]
    """The verdicts on the response when it was shown first and second; empty if no judge was asked."""
    details: Mapping[str, Any]
    """More fields for verdicts.jsonl."""


class _Result(NamedTuple):
    """The results of one checkpoint: shares of its pairs, with intervals over prompts."""

    pairs: int
    prompts: int
    win: Estimate
    tie: Estimate
    lose: Estimate
    score: Estimate
    """win + 0.5 tie."""
    flips: float | None
    """Share of the pairs whose verdicts in the two orders disagree; None if no judge was asked."""
    first_preferred: float | None
    """Share of the verdicts for one response that are for the one shown first: 0.5 without position bias."""
    equal: int
    """Pairs of equal responses, which are ties without a question."""


def write_judgement(
    directory: Path, judged: Mapping[str, Sequence[Judged]], judge: Mapping[str, Any], baseline: Path | None
) -> str:
    """Write all files about the judged pairs of each checkpoint, by its name, into `directory`.

    Args:
        judge: a description of the judge.
        baseline: the file of the responses compared with; None if each row has its own.

    Returns:
        the table of results, for the terminal.
    """
    results = {name: _result(pairs) for name, pairs in judged.items()}
    rows = (_row(name, decision) for name, decisions in judged.items() for decision in decisions)
    write_jsonl(directory / "verdicts.jsonl", rows)
    against = str(baseline) if baseline else "actor_num0_response of each row"
    facts = [f"{name.replace('_', ' ')}: {value}" for name, value in {"baseline": against, **judge}.items()]
    body = ["<h1>Pairwise judgement</h1>", f'<p class="soft">{html.escape("; ".join(facts))}</p>']
    body += _body(judged, results)
    write_atomically(directory / "report.html", page("Pairwise judgement", body))
    write_picture(directory / "report.png", _charts(results))
    checkpoints = {name: _as_dict(result) for name, result in results.items()}
    summary = {"judge": dict(judge), "baseline": against, "checkpoints": checkpoints}
    write_json(directory / "summary.json", summary)
    return text_table("Against the baseline, with 95% intervals", _table_rows(results))


def _row(name: str, judged: Judged) -> dict[str, Any]:
    pair = judged.pair
    texts = {"prompt": pair.response.prompt, "response": pair.response.response, "baseline": pair.baseline.response}
    return {"name": name, **texts, "verdict": judged.outcome, **judged.details}


def _result(judged: Sequence[Judged]) -> _Result:
    prompts = [decision.pair.response.prompt for decision in judged]

    def estimate(worth: Mapping[str, float]) -> Estimate:
        return share_over_prompts([worth.get(decision.outcome, 0.0) for decision in judged], prompts)

    verdicts = [decision.orders for decision in judged if decision.orders]
    # a win of the response shown first, and a loss of it shown second, prefer what was shown first
    prefer_first = [first == "win" for first, _ in verdicts if first != "tie"]
    prefer_first += [second == "lose" for _, second in verdicts if second != "tie"]
    return _Result(
        pairs=len(judged),
        prompts=len(set(prompts)),
        win=estimate({"win": 1.0}),
        tie=estimate({"tie": 1.0}),
        lose=estimate({"lose": 1.0}),
        score=estimate(_WORTH),
        flips=float(np.mean([first != second for first, second in verdicts])) if verdicts else None,
        first_preferred=float(np.mean(prefer_first)) if prefer_first else None,
        equal=sum(decision.pair.response.response == decision.pair.baseline.response for decision in judged),
    )


def _as_dict(result: _Result) -> dict[str, Any]:
    fields = result._asdict().items()
    return {name: value.as_dict() if isinstance(value, Estimate) else value for name, value in fields}


def _table_rows(results: Mapping[str, _Result]) -> list[list[str]]:
    rows = [["", "Pairs", "Win", "Tie", "Lose", "Win + ½ tie", "Flips", "First", "Equal"]]
    for name, result in results.items():
        estimates = result.win, result.tie, result.lose, result.score
        shares = [f"{100 * e.value:.0f}% [{100 * e.low:.0f}, {100 * e.high:.0f}]" for e in estimates]
        bias = ["" if share is None else f"{100 * share:.0f}%" for share in (result.flips, result.first_preferred)]
        rows.append([name, f"{result.pairs:,}", *shares, *bias, str(result.equal)])
    return rows


def _body(judged: Mapping[str, Sequence[Judged]], results: Mapping[str, _Result]) -> Iterator[str]:
    yield plain_table(_table_rows(results))
    text = "Shares of the pairs, each prompt counted alike, with 95% intervals (Wilson's) over prompts."
    if any(result.flips is not None for result in results.values()):
        text += (
            " Each pair was judged in both orders; it is won or lost if both verdicts agree, and a tie otherwise. "
            "Flips: share of the pairs whose verdicts disagree. First: share of the verdicts for the response that was "
            "shown first, 50% without position bias. Equal responses are ties, without a question."
        )
    yield f'<p class="soft">{text}</p>'
    yield section("Results", "Each against the baseline.", _charts(results))
    yield "<h2>Pairs</h2>"
    for name, decisions in judged.items():
        for outcome, color in _OUTCOMES.items():
            for decision in [decision for decision in decisions if decision.outcome == outcome][:_SHOWN]:
                response, baseline = decision.pair
                judged_side = color, f"{name}: {_facts(decision)}", response.response
                yield sample_card(response.prompt, [judged_side, (GRAY, "Baseline", baseline.response)])


def _facts(judged: Judged) -> str:
    details = judged.details
    if "gold_response" in details:
        return f"{judged.outcome}, gold reward {details['gold_response']:.3g} against {details['gold_baseline']:.3g}"
    if not judged.orders:
        return f"{judged.outcome}, equal responses"
    verdicts = zip(("shown first", "shown second"), judged.orders, details["reasons"], strict=True)
    return f"{judged.outcome}. " + " ".join(f"{place}: {verdict} ({reason})" for place, verdict, reason in verdicts)


def _charts(results: Mapping[str, _Result]) -> list[Chart]:
    shares = [
        Series(outcome, color, [], [100 * getattr(result, outcome).value for result in results.values()])
        for outcome, color in _OUTCOMES.items()
    ]
    charts: list[Chart] = [Bars("Win, tie, lose", _BARS, shares, _PERCENT, names=list(results))]
    if scores := _scores(results):
        charts.append(Lines("Over the checkpoints", _LINE, [scores], "step", "win + 0.5 tie"))
    return charts


def _scores(results: Mapping[str, _Result]) -> Series | None:
    """Return win + 0.5 tie over the numbers at the end of the names; None unless there are several, all different."""
    matches = {re.search(r"\d+$", name): result.score for name, result in results.items()}
    steps = {int(match[0]): score for match, score in matches.items() if match}
    if not len(steps) == len(results) > 1:
        return None
    ordered = sorted(steps.items())
    scores = [score for _, score in ordered]
    band = [score.value - score.low for score in scores], [score.high - score.value for score in scores]
    return Series("score", COLORS[0], [step for step, _ in ordered], [score.value for score in scores], band)
