"""Results of an evaluation: a row for each response, means with intervals, best-of-n curves; and their files."""

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nemo_eppo.algorithms.ensembles import combine_scores
from nemo_eppo.data.jsonl import write_jsonl
from nemo_eppo.evaluation.best_of_n import GaoFit, best_of_n, best_of_n_kl, fit_gao, subset_sizes
from nemo_eppo.evaluation.detection import Detector, detectors_of_evaluation
from nemo_eppo.evaluation.intervals import Estimate, Floats, bootstrap_mean, estimate_share
from nemo_eppo.evaluation.responses import Response, says_how_it_ended
from nemo_eppo.files import write_atomically, write_json
from nemo_eppo.rewards.sample import Sample

Row = dict[str, Any]
MEASURES = {  # field of a row -> name, unit
    "proxy_reward": ("Proxy reward", "standardised; of several models, their mean"),
    "gold_reward": ("Gold reward", "standardised if a model gives it"),
    "kl": ("KL to the reference", "nats; log-ratio of a response at temperature 1"),
    "energy_loss": ("Energy loss", "final layer, mean over the response"),
    "reference_energy_loss": ("Energy loss of the reference", "on the same responses"),
    "latent_distance": ("Mahalanobis distance", "of an InfoRM proxy's latents from those of SFT responses"),
    "logprob": ("Log-probability", "nats; sum over the response, at temperature 1"),
    "response_length": ("Response length", "tokens, EOS included"),
    "finished": ("Finished responses", "share that ended with EOS or a stop string"),
}
_UWO_LAMBDA = 0.5  # for best-of-n, arXiv 2310.02743
_FEWEST_SIZES = 3  # values of n that a fit of two coefficients needs


@dataclass(frozen=True)
class Selection:
    """Mean rewards of the best of n answers by one proxy reward."""

    n: list[int]
    kl: list[float]
    """KL divergence of best-of-n from the policy, in nats."""
    proxy: list[float]
    """Mean of the proxy reward itself."""
    gold: list[float] | None
    proxy_fit: GaoFit | None
    """None with fewer than three n."""
    gold_fit: GaoFit | None


@dataclass(frozen=True)
class Results:
    """All results of an evaluation."""

    rows: list[Row]
    """One for each response; those of a prompt are neighbours."""
    prompts: int
    means: dict[str, Estimate]
    """By measure: mean over prompts of the mean over answers, with a 95% interval over prompts."""
    best_of_n: dict[str, Selection]
    """By choosing reward: the only proxy, or each of several and their mean, minimum (wco) and uncertainty-weighted
    mean (uwo)."""
    detectors: list[Detector]
    """How well each sign finds responses of high proxy and low gold reward; empty without both rewards."""


def join_rows(
    responses: Sequence[Response], samples: Sequence[Sample], parts: Mapping[str, Sequence[Row]]
) -> list[Row]:
    """Join the parts' rows of each response; responses to one prompt become neighbours.

    Rows have "finished" if the rows of all responses say how they ended.

    Args:
        samples: the responses as texts.
        parts: rows of "policy" and "reference", as `Scoring` writes them, and of "gold" and any number of proxies
            ("proxy_1", ...), as `RewardScoring` does; each is as long as `responses`.
    """
    groups: dict[Any, list[int]] = defaultdict(list)
    for number, response in enumerate(responses):
        groups[response.row.get("index"), response.prompt.tobytes()].append(number)
    has_finished = all(says_how_it_ended(response.row) for response in responses)
    rows = []
    for prompt, numbers in enumerate(groups.values()):
        for answer, number in enumerate(numbers):
            response, sample = responses[number], samples[number]
            measured = {name: part[number] for name, part in parts.items()}
            row = _texts(prompt, answer, response, sample) | _likelihoods(measured) | _rewards(measured)
            row |= {"finished": sample.finished} if has_finished else {}
            rows.append(row | ({"fields": sample.fields} if sample.fields else {}))
    return rows


def _texts(prompt: int, answer: int, response: Response, sample: Sample) -> Row:
    return {
        "index": prompt,
        "sample": answer,
        "prompt": sample.prompt,
        "response": sample.response,
        "prompt_ids": response.prompt.tolist(),
        "response_ids": response.response.tolist(),
        "response_length": len(response.response),
    }


def _likelihoods(measured: Mapping[str, Row]) -> Row:
    row: Row = {}
    if "policy" in measured:
        row |= {name: measured["policy"][name] for name in ("logprob", "energy_loss")}
    if "reference" in measured:
        logprob, energy = (measured["reference"][name] for name in ("logprob", "energy_loss"))
        row |= {"reference_logprob": logprob, "kl": row["logprob"] - logprob, "reference_energy_loss": energy}
    return row


def _rewards(measured: Mapping[str, Row]) -> Row:
    row: Row = {}
    proxies = [part for name, part in measured.items() if name.startswith("proxy_")]
    if proxies:
        scores = [part["score"] for part in proxies]
        row |= {"proxy_reward": sum(scores) / len(scores), "proxy_rewards": scores}
    squares = [number**2 for part in proxies for number in part.get("latents", ())]
    if squares:
        row["latent_distance"] = math.sqrt(sum(squares))
    if "gold" in measured:
        row["gold_reward"] = measured["gold"]["score"]
    return row


def results_of(rows: list[Row], reward_models: bool, seed: int) -> Results:
    """Compute means, best-of-n curves and detectors from the rows of `join_rows`.

    Args:
        reward_models: all proxies are reward models, none is a function.
    """
    answers = _by_prompt(rows)
    means = {}
    for measure in MEASURES:
        if measure in rows[0]:
            per_prompt = [sum(float(row[measure]) for row in group) / len(group) for group in answers]
            means[measure] = estimate_share(per_prompt) if measure == "finished" else bootstrap_mean(per_prompt, seed)
    fewest = min(map(len, answers))
    curves = {}
    if "proxy_rewards" in rows[0] and fewest > 1:
        scores = np.array([row["proxy_rewards"] for group in answers for row in group])
        ends = np.cumsum([len(group) for group in answers])[:-1]
        for name, values in _choices(scores).items():
            curves[name] = _selection(np.split(values, ends), answers, subset_sizes(fewest), seed)
    return Results(rows, len(answers), means, curves, detectors_of_evaluation(rows, reward_models, seed))


def _by_prompt(rows: Sequence[Row]) -> list[list[Row]]:
    answers: dict[int, list[Row]] = defaultdict(list)
    for row in rows:
        answers[row["index"]].append(row)
    return list(answers.values())


def _choices(scores: Floats) -> dict[str, Floats]:
    """Return the rewards [N] by which answers are chosen, by name, from the scores [N, proxies]."""
    if scores.shape[1] == 1:
        return {"proxy": scores[:, 0]}
    choices = {f"proxy {number}": column for number, column in enumerate(scores.T, start=1)}
    kind: Any
    for kind in ("mean", "wco", "uwo"):
        choices[kind] = combine_scores(torch.from_numpy(scores), kind, _UWO_LAMBDA).numpy()
    return choices


def _selection(
    proxy_rewards: Sequence[Floats], answers: Sequence[Sequence[Row]], sizes: list[int], seed: int
) -> Selection:
    chosen_by = [values[None] for values in proxy_rewards]
    kl = best_of_n_kl(sizes)

    def curve(rewards: Sequence[Floats]) -> tuple[list[float], GaoFit | None]:
        pairs = zip(chosen_by, rewards, strict=True)
        per_prompt = np.concatenate([best_of_n(proxy, scores, sizes) for proxy, scores in pairs])
        fits = len(sizes) >= _FEWEST_SIZES and len(answers) > 1  # a fit to one prompt would have no band
        fit = fit_gao("best_of_n", np.sqrt(kl), per_prompt, seed=seed) if fits else None
        return per_prompt.mean(axis=0).tolist(), fit

    proxy, proxy_fit = curve(chosen_by)
    gold = gold_fit = None
    if "gold_reward" in answers[0][0]:
        gold, gold_fit = curve([np.array([[row["gold_reward"] for row in group]]) for group in answers])
    return Selection(sizes, kl.tolist(), proxy, gold, proxy_fit, gold_fit)


def write_results(directory: Path, results: Results, settings: Mapping[str, Any]) -> None:
    """Write samples.jsonl, gold_eval_with_response_ids.json and summary.json.

    The second is a list of {"instruction", "answers", "answers_ids", "proxy_scores", "gold_scores"}, one for each
    prompt, as NeMo-Aligner's users and the authors of the methods read it; scores of missing rewards are [].
    """
    write_jsonl(directory / "samples.jsonl", results.rows)
    instructions = [
        {
            "instruction": group[0]["prompt"],
            "answers": [row["response"] for row in group],
            "answers_ids": [row["response_ids"] for row in group],
            "proxy_scores": [row["proxy_reward"] for row in group if "proxy_reward" in row],
            "gold_scores": [row["gold_reward"] for row in group if "gold_reward" in row],
        }
        for group in _by_prompt(results.rows)
    ]
    text = json.dumps(instructions, ensure_ascii=False, indent=1)
    write_atomically(directory / "gold_eval_with_response_ids.json", text + "\n")
    summary = {
        "settings": settings,
        "prompts": results.prompts,
        "responses": len(results.rows),
        "means": {name: estimate.as_dict() for name, estimate in results.means.items()},
        "best_of_n": {name: asdict(selection) for name, selection in results.best_of_n.items()},
        "detectors": {detector.sign: detector.as_dict() for detector in results.detectors},
    }
    write_json(directory / "summary.json", summary)
