"""The output files of `nemo-eppo latents`: samples.jsonl, latents.json, report.html and latents.png."""

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

_SEED = 0  # of the folds, and of t-SNE, which hardly depends on it, as it starts from principal components
_FOLDS = 20  # with fewer, Gaussians are fitted to fewer latents, and more held-out ones are outliers
_FARTHEST = 6  # responses on the page
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
    """The responses of one model, and their measures."""

    color: str
    responses: Latents
    distances: list[float]
    p_values: list[float]
    places: list[list[float]]
    """Coordinates [N, 2] by t-SNE."""
    outliers: Estimate


def write_latents(
    directory: Path, sft: Latents, rlhf: Latents, sources: Mapping[str, str], alpha: float, perplexity: float
) -> str:
    """Write all files about the latents of the SFT model's and the policy's responses into `directory`.

    Distances and p-values are those under a Gaussian fitted (with shrinkage) to the SFT latents. Each twentieth of them
    is measured under a Gaussian of the rest, as a Gaussian is nearer to latents that it was fitted to. MOP is the
    fraction of the policy's responses whose p-value is below `alpha`, each prompt counted alike. CSI is computed as by
    the monitor, with the radius of the SFT latents (InfoRM, arXiv 2402.09345); as a baseline, also for one half of
    these against the other.

    Args:
        sources: paths of model and files, for the results.
        perplexity: of t-SNE.

    Returns:
        the table of results, for the terminal.
    """
    csi, radius = _separation(rlhf.latents, sft.latents)
    halves = torch.randperm(len(sft.latents), generator=torch.Generator().manual_seed(_SEED)).chunk(2)
    baseline, _ = _separation(*(sft.latents[half] for half in halves))
    places = np.split(tsne(torch.cat([sft.latents, rlhf.latents]).numpy(), perplexity), [len(sft.latents)])

    def group_of(color: str, responses: Latents, measured: Tensor, coordinates: NDArray[np.float64]) -> _Group:
        distances, p_values = measured.T.tolist()
        outliers = share_over_prompts(np.array(p_values) < alpha, (prompt for prompt, _ in responses.texts))
        return _Group(color, responses, distances, p_values, coordinates.tolist(), outliers)

    groups = {
        "sft": group_of(GRAY, sft, _measure_held_out(sft.latents), places[0]),
        "rlhf": group_of(COLORS[1], rlhf, _measure(rlhf.latents, sft.latents), places[1]),
    }
    rows = (
        {"set": name, "line": line, "reward": reward, "mahalanobis": distance, "p_value": p_value, "tsne": place}
        for name, group in groups.items()
        for line, reward, distance, p_value, place in zip(
            group.responses.lines, group.responses.rewards, group.distances, group.p_values, group.places, strict=True
        )
    )
    write_jsonl(directory / "samples.jsonl", rows)
    results: dict[str, Any] = {
        **sources,
        "latent_size": sft.latents.shape[1],
        "responses": {name: len(group.distances) for name, group in groups.items()},
        "mean_mahalanobis": {name: float(np.mean(group.distances)) for name, group in groups.items()},
        "mean_reward": {name: float(np.mean(group.responses.rewards)) for name, group in groups.items()},
        "alpha": alpha,
        "outlier_fraction": {name: group.outliers.as_dict() for name, group in groups.items()},
        "mop": groups["rlhf"].outliers.value,
        "csi": csi,
        "csi_per_response": {"sft": baseline / len(halves[0]), "rlhf": csi / len(rlhf.latents)},
        "csi_radius": radius,
    }
    charts, table = _charts(groups), _table(results, groups)
    write_atomically(directory / "report.html", page("Latents", list(_body(results, table, charts, groups["rlhf"]))))
    write_picture(directory / "latents.png", charts)
    write_json(directory / "latents.json", results)
    return text_table("Latents", table)


def _measure(latents: Tensor, sft: Tensor) -> Tensor:
    """Return distances and p-values, fp64 [N, 2], of latents [N, d] under a Gaussian of the SFT latents."""
    gaussian = fit_gaussian(sft)
    return torch.stack([mahalanobis(latents, gaussian), p_values(latents, gaussian)], dim=1)


def _measure_held_out(sft: Tensor) -> Tensor:
    """Return `_measure` [N, 2] of SFT latents [N, d], of each twentieth under a Gaussian of the rest."""
    measured = torch.empty(len(sft), 2, dtype=torch.float64)
    for fitted, held_out in KFold(min(_FOLDS, len(sft)), shuffle=True, random_state=_SEED).split(sft):
        measured[held_out] = _measure(sft[held_out], sft[fitted])
    return measured


def _separation(latents: Tensor, sft: Tensor) -> tuple[float, float]:
    """Return the CSI of latents against SFT latents, and the radius of the latter."""
    reference = SFTLatents(len(sft))
    reference.add(sft)
    return cluster_separation_index(latents, sft, reference.radius), reference.radius


def tsne(points: NDArray[np.float64], perplexity: float) -> NDArray[np.float64]:
    """Map points [N, d] to the plane [N, 2] by t-SNE that starts from their principal components.

    The same points give the same map on any number of cores. The perplexity is limited to (N - 1) / 3.
    """
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    if points.shape[1] == 1:  # the start needs two principal components
        points = np.column_stack([points, np.zeros(len(points))])
    perplexity = min(perplexity, (len(points) - 1) / 3)
    with threadpool_limits(1):  # the rounding of sums depends on the number of threads
        method = TSNE(perplexity=perplexity, init="pca", random_state=_SEED)
        coordinates: NDArray[np.float64] = method.fit_transform(points).astype(np.float64)
    return coordinates


def _charts(groups: Mapping[str, _Group]) -> list[Chart]:
    cloud, spread = [], []
    for name, group in groups.items():
        x, y = zip(*group.places, strict=True)
        cloud.append(Series(name.upper(), group.color, x, y, notes=[text[:80] for _, text in group.responses.texts]))
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
    results: Mapping[str, Any], table: Sequence[Sequence[str]], charts: Sequence[Chart], rlhf: _Group
) -> Iterator[str]:
    yield "<h1>Latents of SFT and RLHF responses</h1>"
    sources = "; ".join(f"{name}: {results[name]}" for name in ("model", "sft", "rlhf"))
    yield f'<p class="soft">{html.escape(sources)}</p>' + plain_table(table)
    yield (
        '<p class="soft">Means over the responses. Outliers have a p-value below '
        f"{results['alpha']:g} under a Gaussian of the SFT latents; of Gaussian latents, that share would be outliers. "
        "Brackets hold 95% intervals. Each twentieth of the SFT responses is compared with the rest. CSI grows with "
        "clusters of RLHF responses that are far from all SFT responses; that of SFT compares one half of them with "
        "the other.</p>"
    )
    yield section("Where the responses lie", f"{results['latent_size']} latent dimensions.", charts)
    yield "<h2>RLHF responses farthest from the SFT responses</h2>"
    for index in sorted(range(len(rlhf.distances)), key=lambda index: -rlhf.distances[index])[:_FARTHEST]:
        prompt, response = rlhf.responses.texts[index]
        facts = (
            f"Line {rlhf.responses.lines[index]}: distance {rlhf.distances[index]:.4g}, "
            f"p-value {rlhf.p_values[index]:.2g}, reward {rlhf.responses.rewards[index]:.4g}"
        )
        yield sample_card(prompt, [(COLORS[1], facts, response)])
