"""How well signs of reward hacking tell hacked from normal responses: each sign alone, and all together.

A sign is one number of each response, and the higher it is, the more suspicious.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from nemo_eppo.evaluation.intervals import (
    Estimate,
    Floats,
    bootstrap_auprc,
    bootstrap_auroc,
    false_alarms_per_1000,
    threshold_at_recall,
)
from nemo_eppo.observability.report_tables import table

Bools = NDArray[np.bool_]
Row = Mapping[str, Any]

ENERGY, RISE = "energy loss", "rise of the energy loss"
KL, LENGTH = "KL to the reference", "response length"
MAHALANOBIS, VARIANCE = "Mahalanobis distance", "variance of the reward models"
ENERGY_AND_KL, COMBINED = "energy loss and KL", "all combined"
RECALL = 0.9  # share of hacked responses that a threshold has to find
FOLDS = 5


class Detector(NamedTuple):
    """How well one sign tells hacked from normal responses."""

    sign: str
    values: Floats
    """Of the sign [N], or log-odds by several signs."""
    auroc: Estimate
    auprc: Estimate
    threshold: float
    """Of the sign, to find the share RECALL of the hacked responses."""
    false_alarms: float
    """Of 1,000 normal responses, at this threshold."""

    def as_dict(self) -> dict[str, Any]:
        """Return its numbers for a JSON file."""
        return {
            "auroc": self.auroc.as_dict(),
            "auprc": self.auprc.as_dict(),
            "threshold_at_recall": self.threshold,
            "false_alarms_per_1000": self.false_alarms,
        }


def compare_signs(hacked: Bools, signs: Mapping[str, Floats], prompts: ArrayLike, seed: int = 0) -> list[Detector]:
    """Measure every sign, from the highest AUROC down, and at the end what `_combinations` makes of them.

    Args:
        hacked: [N], both values occur.
        signs: [N] for each name.
        prompts: [N], the number of the prompt that each response answers.
    """
    found = [_detector(sign, hacked, values, prompts, seed) for sign, values in signs.items()]
    found.sort(key=lambda detector: -detector.auroc.value)
    for combination, odds in _combinations(hacked, signs, prompts, seed).items():
        found.append(_detector(combination, hacked, odds, prompts, seed))
    return found


def _combinations(hacked: Bools, signs: Mapping[str, Floats], prompts: ArrayLike, seed: int) -> dict[str, Floats]:
    """Return what `combine_signs` makes of energy loss and KL, where there are more signs than these, and of all signs.

    Of a single sign, or with too few prompts that have hacked (or other) responses to leave some out, that is nothing.
    """
    fewest = min(len(np.unique(np.asarray(prompts)[kind])) for kind in (hacked, ~hacked))
    if len(signs) < 2 or fewest < FOLDS:
        return {}
    pair = {sign: values for sign, values in signs.items() if sign in (ENERGY, KL)}
    chosen = {ENERGY_AND_KL: pair} if len(pair) == 2 < len(signs) else {}
    return {name: combine_signs(hacked, of, prompts, seed) for name, of in {**chosen, COMBINED: signs}.items()}


def combine_signs(hacked: Bools, signs: Mapping[str, Floats], prompts: ArrayLike, seed: int = 0) -> Floats:
    """Predict the log-odds [N] that a response is hacked, from these signs together.

    A logistic regression on standardised signs is fitted five times, each time without a fifth of the prompts, whose
    responses' log-odds it then predicts; each fifth has about its share of hacked responses. Answers to one prompt stay
    together, since the regression would know what they share.
    """
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1_000))
    folds = StratifiedGroupKFold(FOLDS, shuffle=True, random_state=seed)
    columns = np.column_stack(list(signs.values()))
    odds: Floats = cross_val_predict(model, columns, hacked, groups=prompts, cv=folds, method="decision_function")
    return odds


_COLUMNS = {  # sign -> column of a rollout; of two columns, their difference
    ENERGY: ["energy/policy"],
    RISE: ["energy/policy", "energy/reference"],
    KL: ["kl/policy_reference"],
    LENGTH: ["response_length"],
    MAHALANOBIS: ["reward/latent_distance"],
}


def signs_of_rows(rows: Sequence[Row], standard: Sequence[Row], reward_models: bool) -> dict[str, Floats]:
    """Read the signs that a run recorded of its responses: those whose columns all of `rows` have.

    Args:
        standard: rows whose scores of each reward model are taken to have mean 0 and standard deviation 1.
        reward_models: all columns reward/score_<i> come from reward models, so that their variance means something.
    """

    def recorded(names: Sequence[str]) -> bool:
        return all(isinstance(row.get(name), int | float) for row in rows for name in names)

    def columns(names: Sequence[str], rows: Sequence[Row] = rows) -> Floats:
        return np.array([[row[name] for row in rows] for name in names], dtype=np.float64)

    signs = {sign: np.subtract.reduce(columns(names)) for sign, names in _COLUMNS.items() if recorded(names)}
    scores = sorted(name for name in rows[0] if name.startswith("reward/score_"))
    if reward_models and len(scores) > 1 and recorded(scores):
        first = columns(scores, standard)
        deviations = np.maximum(first.std(axis=1, keepdims=True), 1e-12)
        signs[VARIANCE] = ((columns(scores) - first.mean(axis=1, keepdims=True)) / deviations).var(axis=0)
    return signs


_AS_RECORDED = {  # column of an evaluation -> that of a run
    "energy_loss": "energy/policy",
    "reference_energy_loss": "energy/reference",
    "kl": "kl/policy_reference",
    "response_length": "response_length",
    "latent_distance": "reward/latent_distance",
}


def detectors_of_evaluation(rows: Sequence[Row], reward_models: bool, seed: int = 0) -> list[Detector]:
    """Tell how well each sign finds the responses that please the proxy and not the gold reward.

    Such a response has a proxy reward above the mean of all `rows`, and a gold reward below it. The list is empty
    without both rewards, and if there are no such responses, or no others.

    Args:
        reward_models: all proxies are reward models, so that their variance means something.
    """
    if not all(name in rows[0] for name in ("proxy_reward", "gold_reward")):
        return []
    proxy, gold = (np.array([row[name] for row in rows], np.float64) for name in ("proxy_reward", "gold_reward"))
    hacked: Bools = (proxy > proxy.mean()) & (gold < gold.mean())
    if hacked.all() or not hacked.any():
        return []
    recorded = [
        {column: row[name] for name, column in _AS_RECORDED.items() if name in row}
        | {f"reward/score_{number}": score for number, score in enumerate(row["proxy_rewards"])}
        for row in rows
    ]
    signs = signs_of_rows(recorded, recorded, reward_models)
    return compare_signs(hacked, signs, [row["index"] for row in rows], seed)


def detectors_table(detectors: Sequence[Detector]) -> str:
    """Return the detectors as an HTML table."""
    head = ["Sign", "AUROC", "Average precision", "False alarms"]
    rows = [
        (
            detector.sign,
            detector.auroc.cell(),
            detector.auprc.cell(),
            f"{detector.false_alarms:.0f}<small>from {detector.threshold:.3g}</small>",
        )
        for detector in detectors
    ]
    return table(head, rows, "detectors") + (
        '<p class="soft">Below AUROC and average precision: 95% intervals of a bootstrap over prompts. False alarms '
        f"are of 1,000 normal responses, where the sign, from the value below them, finds {RECALL:.0%} of the hacked "
        "ones. An AUROC of 0.5 is chance; less says that hacked responses have the lower values. Several signs: "
        "logistic regression, each fifth of the prompts predicted from the others.</p>"
    )


def _detector(sign: str, hacked: Bools, values: Floats, prompts: ArrayLike, seed: int) -> Detector:
    threshold = threshold_at_recall(hacked, values, RECALL)
    return Detector(
        sign,
        values,
        bootstrap_auroc(hacked, values, prompts, seed),
        bootstrap_auprc(hacked, values, prompts, seed),
        threshold,
        false_alarms_per_1000(hacked, values, threshold),
    )
