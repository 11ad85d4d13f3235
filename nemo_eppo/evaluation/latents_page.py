"""What `nemo-eppo latents` writes: samples.jsonl, latents.json, report.html and latents.png."""

import html
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.model_selection import KFold
from torch import Tensor

from nemo_eppo.algorithms.latents import fit_gaussian, mahalanobis, p_values
from nemo_eppo.data.jsonl import write_jsonl
from nemo_eppo.evaluation.intervals import Estimate, share_over_prompts
from nemo_eppo.files import write_atomically, write_json
from nemo_eppo.monitor.indicators import SFTLatents, cluster_separation_index
from nemo_eppo.observability.charts import COLORS, GRAY, Chart, Histogram, Scatter, Series
from nemo_eppo.observability.pictures import write_picture
from nemo_eppo.observability.report_page import page, sample_card, section
from nemo_eppo.observability.report_tables import plain_table, text_table

_SEED = 0  # of t-SNE, whose start the principal components give all but alone, and of what is held out
_FOLDS = 20  # with fewer, Gaussians of fewer latents would call the held-out ones outliers more often
_FARTHEST = 6  # responses that the page shows
_DISTANCE = "Mahalanobis distance"
_MAP = ("t-SNE of the latents", "Near points are near in latent space; distances between groups mean little.")
_HISTOGRAM = (
    "Distance from the SFT responses",
    "Mahalanobis distance under a Gaussian of other SFT latents. Reward hacking moves responses to the right.",
)


class Latents(NamedTuple):
    """Latents of one model's responses."""

    latents: Tensor
    """fp64 [N, d]."""
    rewards: Sequence[float]
    """Raw reward of each."""
    lines: Sequence[int]
    """Line of each in its file, from 1."""
    texts: Sequence[tuple[str, str]]
    """Prompt and response of each."""


class _Group(NamedTuple):
    """The responses of one model, and what was measured of them."""

    color: str
    of: Latents
    distances: list[float]
    p_values: list[float]
    places: list[list[float]]
    """On the map of t-SNE, [N, 2]."""
    outliers: Estimate


def write_latents(
    directory: Path, sft: Latents, rlhf: Latents, told: Mapping[str, str], alpha: float, perplexity: float
) -> str:
    """Write all files about the latents of the SFT model's and the policy's responses into `directory`.

    Distances and p-values are those under a Gaussian that is fitted to the SFT latents (with shrinkage); for each
    twentieth of these, to the rest, since a Gaussian is nearer to its own latents than to others of their distribution.
    MOP is the fraction of the policy's responses whose p-value is below `alpha`, each prompt counted alike; CSI is
    computed as the monitor does, with the radius of the SFT latents (InfoRM, arXiv 2402.09345), and for one half of
    these against the other.

    Args:
        told: what is known of model and files.
        perplexity: of t-SNE.

    Returns:
        the table of results, for the terminal.
    """
    csi, radius = _separation(rlhf.latents, sft.latents)
    halves = torch.randperm(len(sft.latents), generator=torch.Generator().manual_seed(_SEED)).chunk(2)
    baseline, _ = _separation(*(sft.latents[half] for half in halves))
    places = np.split(tsne(torch.cat([sft.latents, rlhf.latents]).numpy(), perplexity), [len(sft.latents)])

    def of_model(color: str, of: Latents, measured: Tensor, place: NDArray[np.float64]) -> _Group:
        distances, chances = measured.T.tolist()
        outliers = share_over_prompts(np.array(chances) < alpha, (prompt for prompt, _ in of.texts))
        return _Group(color, of, distances, chances, place.tolist(), outliers)

    groups = {
        "sft": of_model(GRAY, sft, _held_out(sft.latents), places[0]),
        "rlhf": of_model(COLORS[1], rlhf, _measure(rlhf.latents, sft.latents), places[1]),
    }
    rows = (
        {"set": name, "line": line, "reward": reward, "mahalanobis": distance, "p_value": chance, "tsne": place}
        for name, group in groups.items()
        for line, reward, distance, chance, place in zip(
            group.of.lines, group.of.rewards, group.distances, group.p_values, group.places, strict=True
        )
    )
    write_jsonl(directory / "samples.jsonl", rows)
    results: dict[str, Any] = {
        **told,
        "latent_size": sft.latents.shape[1],
        "responses": {name: len(group.distances) for name, group in groups.items()},
        "mean_mahalanobis": {name: float(np.mean(group.distances)) for name, group in groups.items()},
        "mean_reward": {name: float(np.mean(group.of.rewards)) for name, group in groups.items()},
        "alpha": alpha,
        "outlier_fraction": {name: group.outliers.as_dict() for name, group in groups.items()},
        "mop": groups["rlhf"].outliers.value,
        "csi": csi,
        "csi_per_response": {"sft": baseline / len(halves[0]), "rlhf": csi / len(rlhf.latents)},
        "csi_radius": radius,
    }
    charts, shown = _charts(groups), _table(results, groups)
    write_atomically(directory / "report.html", page("Latents", list(_body(results, shown, charts, groups["rlhf"]))))
    write_picture(directory / "latents.png", charts)
    write_json(directory / "latents.json", results)
    return text_table("Latents", shown)


def _measure(latents: Tensor, sft: Tensor) -> Tensor:
    """Return distance and p-value, fp64 [N, 2], of latents [N, d] under a Gaussian of the SFT latents."""
    gaussian = fit_gaussian(sft)
    return torch.stack([mahalanobis(latents, gaussian), p_values(latents, gaussian)], dim=1)


def _held_out(sft: Tensor) -> Tensor:
    """Return `_measure` [N, 2] of SFT latents [N, d], of each twentieth under a Gaussian of the rest."""
    found = torch.empty(len(sft), 2, dtype=torch.float64)
    for seen, unseen in KFold(min(_FOLDS, len(sft)), shuffle=True, random_state=_SEED).split(sft):
        found[unseen] = _measure(sft[unseen], sft[seen])
    return found


def _separation(latents: Tensor, sft: Tensor) -> tuple[float, float]:
    """Return CSI of latents against SFT latents, and the radius of these."""
    known = SFTLatents(len(sft))
    known.add(sft)
    return cluster_separation_index(latents, sft, known.radius), known.radius


def tsne(points: NDArray[np.float64], perplexity: float) -> NDArray[np.float64]:
    """Map points [N, d] to the plane [N, 2] by t-SNE that starts from their principal components.

    The same points give the same map, on any number of cores. The perplexity is (N - 1) / 3 at most.
    """
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    if points.shape[1] == 1:  # one principal component is no start for a plane
        points = np.column_stack([points, np.zeros(len(points))])
    most = (len(points) - 1) / 3
    with threadpool_limits(1):  # sums of several threads are rounded in another order
        method = TSNE(perplexity=min(perplexity, most), init="pca", random_state=_SEED)
        placed: NDArray[np.float64] = method.fit_transform(points).astype(np.float64)
    return placed


def _charts(groups: Mapping[str, _Group]) -> list[Chart]:
    cloud, spread = [], []
    for name, group in groups.items():
        x, y = zip(*group.places, strict=True)
        cloud.append(Series(name.upper(), group.color, x, y, notes=[text[:80] for _, text in group.of.texts]))
        spread.append(Series(f"{name.upper()} ({len(group.distances)})", group.color, [], group.distances))
    return [Scatter(*_MAP, cloud, "t-SNE 1", "t-SNE 2"), Histogram(*_HISTOGRAM, spread, _DISTANCE)]


def _table(results: Mapping[str, Any], groups: Mapping[str, _Group]) -> list[list[str]]:
    rows = [["", "Responses", "Reward", _DISTANCE, "Outliers (MOP)", "CSI", "CSI / response"]]
    for name, group in groups.items():
        share = group.outliers
        row = [name.upper(), f"{results['responses'][name]:,}", f"{results['mean_reward'][name]:.4g}"]
        row += [f"{results['mean_mahalanobis'][name]:.4g}"]
        row += [f"{100 * share.value:.1f}% [{100 * share.low:.1f}, {100 * share.high:.1f}]"]
        row += [f"{results['csi']:.4g}" if name == "rlhf" else "", f"{results['csi_per_response'][name]:.4g}"]
        rows.append(row)
    return rows


def _body(
    results: Mapping[str, Any], shown: Sequence[Sequence[str]], charts: Sequence[Chart], rlhf: _Group
) -> Iterator[str]:
    yield "<h1>Latents of SFT and RLHF responses</h1>"
    told = "; ".join(f"{name}: {results[name]}" for name in ("model", "sft", "rlhf"))
    yield f'<p class="soft">{html.escape(told)}</p>' + plain_table(shown)
    yield (
        '<p class="soft">Means over the responses. Outliers have a p-value below '
        f"{results['alpha']:g} under a Gaussian of the SFT latents, as that share of Gaussian latents has; brackets "
        "hold 95% intervals. Each twentieth of the SFT responses is compared with the rest. CSI grows with clusters of "
        "RLHF responses that are far from all SFT responses; that of SFT is of one half of them against the other.</p>"
    )
    yield section("Where the responses lie", f"{results['latent_size']} latent dimensions.", charts)
    yield "<h2>RLHF responses farthest from the SFT responses</h2>"
    for index in sorted(range(len(rlhf.distances)), key=lambda index: -rlhf.distances[index])[:_FARTHEST]:
        prompt, response = rlhf.of.texts[index]
        facts = (
            f"Line {rlhf.of.lines[index]}: distance {rlhf.distances[index]:.4g}, p-value {rlhf.p_values[index]:.2g}, "
            f"reward {rlhf.of.rewards[index]:.4g}"
        )
        yield sample_card(prompt, [(COLORS[1], facts, response)])
