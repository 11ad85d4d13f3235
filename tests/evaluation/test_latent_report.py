"""`nemo-eppo latents`: distances, p-values, CSI and t-SNE against scipy and scikit-learn; the same files again."""

import json
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from browser import assert_fits, needs_chromium
from distributed import run_ranks
from jobs import LATENTS, Models
from scipy.spatial.distance import mahalanobis
from scipy.stats import chi2
from sklearn.cluster import DBSCAN
from sklearn.covariance import LedoitWolf
from sklearn.manifold import TSNE
from sklearn.model_selection import KFold
from sklearn.neighbors import NearestNeighbors
from small_data import read_rows

from nemo_eppo.cli import main
from nemo_eppo.evaluation.latents_page import _measure, _measure_held_out
from nemo_eppo.tools.noun_task import HEDGES, sample_prompt, sample_sft_response

ALPHA = 0.05


def run(*arguments: str) -> None:
    assert main(["latents", *arguments]) == 0


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Responses of the noun task, and of a policy that hedges."""
    random, root, found = Random(5), tmp_path_factory.mktemp("responses"), {}
    for name, rows in (("sft", 60), ("rlhf", 40)):
        found[name] = root / f"{name}.jsonl"
        with found[name].open("w") as file:
            for _ in range(rows):
                prompt = sample_prompt(random)
                response = sample_sft_response(prompt, random) + (
                    f" {random.choice(HEDGES)}" * 3 if name == "rlhf" else ""
                )
                file.write(
                    json.dumps({"prompt": prompt, "response": response.strip() or "apple", "finished": True}) + "\n"
                )
    return found


@pytest.fixture(scope="module")
def arguments(trained: dict[str, Path], files: dict[str, Path]) -> list[str]:
    texts = ["--model", str(trained["inform"]), "--sft", str(files["sft"]), "--rlhf", str(files["rlhf"])]
    return [*texts, "--alpha", str(ALPHA)]


@pytest.fixture(scope="module")
def output(arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("latents") / "new"
    run_ranks(run, 1, *arguments, "--output", str(directory))
    return directory


@pytest.fixture(scope="module")
def latents(output: Path) -> dict[str, np.ndarray]:
    return {
        name: np.array([row["latents"] for row in read_rows(output / "parts" / f"{name}.jsonl")])
        for name in ("sft", "rlhf")
    }


def samples(output: Path, name: str, field: str) -> list[Any]:
    return [row[field] for row in read_rows(output / "samples.jsonl") if row["set"] == name]


def results(output: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((output / "latents.json").read_text())
    return found


def test_distances_and_p_values_are_those_of_scipy(output: Path, latents: dict[str, np.ndarray]) -> None:
    assert latents["sft"].shape == (60, LATENTS)

    def measured(seen: np.ndarray, unseen: np.ndarray) -> list[float]:
        fitted = LedoitWolf().fit(seen)
        inverse = np.linalg.inv(fitted.covariance_)
        return [mahalanobis(one, fitted.location_, inverse) for one in unseen]

    held_out = np.empty(60)
    for seen, unseen in KFold(20, shuffle=True, random_state=0).split(latents["sft"]):
        held_out[unseen] = measured(latents["sft"][seen], latents["sft"][unseen])
    for name, expected in (("sft", held_out.tolist()), ("rlhf", measured(latents["sft"], latents["rlhf"]))):
        assert samples(output, name, "mahalanobis") == pytest.approx(expected, rel=1e-9)
        chances = chi2.sf(np.square(expected), LATENTS)
        assert samples(output, name, "p_value") == pytest.approx(list(chances), rel=1e-9)
        assert results(output)["outlier_fraction"][name]["value"] == pytest.approx((chances < ALPHA).mean())
        assert results(output)["mean_mahalanobis"][name] == pytest.approx(np.mean(expected))
    assert results(output)["mop"] == results(output)["outlier_fraction"]["rlhf"]["value"]


def test_csi_is_that_of_dbscan_clusters(output: Path, latents: dict[str, np.ndarray]) -> None:
    near = NearestNeighbors(n_neighbors=6).fit(latents["sft"]).kneighbors(latents["sft"])[0]  # itself and 5 others
    radius = np.quantile(near[:, 5], 0.95)
    assert results(output)["csi_radius"] == pytest.approx(radius, rel=1e-5)
    labels = DBSCAN(eps=results(output)["csi_radius"], min_samples=5).fit_predict(latents["rlhf"])
    assert labels.max() >= 0, "there is a cluster"
    total = 0.0
    for label in range(labels.max() + 1):
        members = latents["rlhf"][labels == label]
        total += len(members) * np.linalg.norm(latents["sft"] - members.mean(axis=0), axis=1).min()
    assert results(output)["csi"] == pytest.approx(total, rel=1e-6)
    assert results(output)["csi_per_response"]["rlhf"] == pytest.approx(total / 40, rel=1e-6)


def test_csi_of_one_half_of_the_sft_responses_against_the_other_is_beside_it(
    output: Path, latents: dict[str, np.ndarray]
) -> None:
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    new, sft = latents["sft"][order[:30]], latents["sft"][order[30:]]
    near = NearestNeighbors(n_neighbors=6).fit(sft).kneighbors(sft)[0]
    labels = DBSCAN(eps=np.quantile(near[:, 5], 0.95), min_samples=5).fit_predict(new)
    members = [new[labels == label] for label in range(labels.max() + 1)]
    total = sum(len(one) * np.linalg.norm(sft - one.mean(axis=0), axis=1).min() for one in members)
    assert results(output)["csi_per_response"]["sft"] == pytest.approx(total / 30, rel=1e-5)


def test_responses_of_one_distribution_are_equally_far() -> None:
    """A Gaussian that was fitted to the SFT latents would call them nearer than others of the same distribution."""
    draw = torch.Generator().manual_seed(0)
    both = torch.randn(2, 900, 128, generator=draw, dtype=torch.float64) / torch.arange(1, 129).sqrt()
    sft, others = both
    measured = (_measure(sft, sft), _measure_held_out(sft), _measure(others, sft))
    fitted, held_out, new = (one[:, 0].mean().item() for one in measured)
    assert new > 1.04 * fitted
    assert held_out == pytest.approx(new, rel=0.025)
    outliers = [(one[:, 1] < ALPHA).double().mean().item() for one in measured]
    assert outliers[1] == pytest.approx(outliers[2], abs=0.03)
    assert outliers[2] > 10 * outliers[0]


def test_the_map_is_scikit_learn_s_from_principal_components(output: Path, latents: dict[str, np.ndarray]) -> None:
    points = np.concatenate([latents["sft"], latents["rlhf"]])
    expected = TSNE(init="pca", perplexity=30.0, random_state=0).fit_transform(points)
    got = np.array(samples(output, "sft", "tsne") + samples(output, "rlhf", "tsne"))
    np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-3)


def test_the_same_input_gives_the_same_files_and_another_alpha_needs_no_model_pass(
    arguments: list[str], output: Path, tmp_path: Path
) -> None:
    run_ranks(run, 1, *arguments, "--output", str(tmp_path / "again"))
    for name in ("samples.jsonl", "latents.json", "latents.png"):
        assert (tmp_path / "again" / name).read_bytes() == (output / name).read_bytes()
    part = tmp_path / "again" / "parts" / "rlhf.jsonl"
    before = part.stat().st_mtime_ns
    run_ranks(run, 1, *arguments, "--output", str(tmp_path / "again"), "--alpha", "0.5")
    assert part.stat().st_mtime_ns == before
    assert (tmp_path / "again" / "samples.jsonl").read_bytes() == (output / "samples.jsonl").read_bytes()
    assert results(tmp_path / "again")["mop"] > results(output)["mop"]


def test_rows_name_their_lines_and_the_page_the_farthest(output: Path, files: dict[str, Path]) -> None:
    assert samples(output, "rlhf", "line") == list(range(1, 41))
    rewards = [row["reward"] for row in read_rows(output / "parts" / "rlhf.jsonl")]
    assert samples(output, "rlhf", "reward") == rewards
    distances = samples(output, "rlhf", "mahalanobis")
    farthest = int(np.argmax(distances))
    cards = (output / "report.html").read_text().split('<div class="card sample">')[1:]
    assert f"Line {farthest + 1}: distance {distances[farthest]:.4g}" in cards[0]
    assert read_rows(files["rlhf"])[farthest]["response"] in cards[0]


@needs_chromium
def test_the_page_fits_a_phone_and_a_desktop(output: Path) -> None:
    assert_fits(output / "report.html")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["--model", "{rm}"], "has no latents; expected 'inform'"),
        (["--sft", "{few}"], "has 5 rows; expected at least 6"),
        (["--sft", "nowhere"], "nowhere: no such file"),
        (["--alpha", "0"], "alpha = 0.0"),
        (["--perplexity", "nan"], "perplexity = nan"),
        (["--output", "{taken}"], "holds something else"),
        (["--chat-template"], "--chat-template: the tokenizer"),
    ],
)
def test_bad_input_is_named(
    change: list[str],
    said: str,
    arguments: list[str],
    files: dict[str, Path],
    models: Models,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    few, taken = tmp_path / "few.jsonl", tmp_path / "taken"
    few.write_text("".join(files["sft"].read_text().splitlines(keepends=True)[:5]))
    taken.mkdir()
    (taken / "precious").touch()
    names = {"rm": str(models.rm), "few": str(few), "taken": str(taken)}
    output = ["--output", str(tmp_path / "out")]
    assert main(["latents", *arguments, *output, *(text.format(**names) for text in change)]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
