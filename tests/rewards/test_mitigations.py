"""Ensembles, divergence penalties and user terms inside the pipeline, and every pair of terms together."""

import itertools
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_reward_pipeline import MASK, B, S, final, make_inputs, pipeline

from nemo_eppo.algorithms.divergences import sequence_divergence
from nemo_eppo.algorithms.latents import fit_gaussian
from nemo_eppo.config import ConfigError
from nemo_eppo.rewards.inputs import Column

sys.path.insert(0, str(Path(__file__).parent))  # the user's own module

OWN = {"name": "bonus", "term": "own_terms:Bonus", "settings": {"bonus": 0.5}}
TERMS: dict[str, dict[str, Any]] = {
    "uwo": {"combine": "uwo", "uwo_lambda": 0.5},
    "wco": {"combine": "wco"},
    "latents": {"latent_penalty": {"gamma": 0.3}},
    "length_authors": {"length_penalty": {"kind": "authors", "length": 5}},
    "length_linear": {"length_penalty": {"kind": "linear", "length": 4, "coefficient": 0.3}},
    "soft_overlong": {"length_penalty": {"kind": "soft_overlong", "length": 10, "buffer": 6}},
    "missing_eos": {"missing_eos": {"penalty": 0.7}},
    "energy": {"energy_penalty": {"eta": 2.0}},
    "energy_run": {"energy_penalty": {"eta": 2.0, "standardize": True, "floor_ratio": 0.8}},
    "clip": {"clip": {"range": 0.6}},
    "kl": {"kl": {"coefficient": 0.1, "estimator": "k3"}},
    "seq_kl": {"divergence": {"kind": "kl", "coefficient": 0.1, "placement": "reward"}},
    "chi2": {"divergence": {"kind": "chi2", "coefficient": 0.01, "placement": "reward"}},
    "sqrt_chi2": {"divergence": {"kind": "sqrt_chi2", "coefficient": 0.1, "placement": "reward"}},
    "own": {"terms": [OWN]},
}


@pytest.mark.parametrize(("one", "other"), itertools.combinations(TERMS, 2))
def test_every_pair_of_terms_adds_up(one: str, other: str) -> None:
    settings = {"combine": "mean", "energy_penalty": {"eta": 0}, "clip": {"range": None}, **TERMS[one], **TERMS[other]}
    run = pipeline(settings)
    for seed in range(2):
        result = run(make_inputs(seed, models=3))
        contributions = result.ledger.contributions
        total = torch.stack(list(contributions.values())).sum(0)
        torch.testing.assert_close(result.token_rewards.double().sum(1), total, rtol=1e-6, atol=1e-6)
        assert torch.equal(final(result), total)
    at_work = {name for name, x in contributions.items() if x.abs().max() > 0}
    changing = {*TERMS[one], *TERMS[other]} - {"combine", "uwo_lambda"}
    assert len(at_work - {"reward/proxy"}) == len(changing)


def test_the_latent_penalty_is_the_mahalanobis_distance() -> None:
    from sklearn.covariance import LedoitWolf

    sft = torch.randn(500, 5, dtype=torch.float64) @ torch.randn(5, 5, dtype=torch.float64) + 3
    latents = 3 + 2 * torch.randn(B, 5, dtype=torch.float64)
    gaussian = fit_gaussian(sft)
    whitened = torch.linalg.solve_triangular(gaussian.factor, (latents - gaussian.mean).T, upper=False).T
    penalty = pipeline({"latent_penalty": {"gamma": 0.3}})(make_inputs(latents=whitened))
    expected = LedoitWolf().fit(sft.numpy()).mahalanobis(latents.numpy()) ** 0.5
    assert penalty.ledger.contributions["reward/latent_penalty"].tolist() == pytest.approx((-0.3 * expected).tolist())
    with pytest.raises(ValueError, match=r"latents: needed for shaping\.latent_penalty"):
        pipeline({"latent_penalty": {"gamma": 0.3}})(make_inputs(latents=None))


def test_a_latent_penalty_on_models_without_latents_is_refused() -> None:
    run = pipeline({"latent_penalty": {"gamma": 0.3}})
    run.check_sources([Column(name="model")], latent_size=4)
    with pytest.raises(ConfigError, match=r"shaping\.latent_penalty \(gamma=0\.3\) needs latents, but none .* any"):
        run.check_sources([Column(name="model")], latent_size=0)


def test_uwo_penalises_the_variance_of_standardised_scores() -> None:
    columns = [Column(name="model", mean=2.0, std=std) for std in (1.0, 2.0, 4.0)]
    inputs = make_inputs(models=3, columns=columns)
    proxy = pipeline({"combine": "uwo", "uwo_lambda": 0.5, "uwo_ddof": 1})(inputs).ledger.contributions["reward/proxy"]
    standard = ((inputs.scores.double() - 2) / torch.tensor([1.0, 2.0, 4.0])).numpy()
    assert proxy.tolist() == pytest.approx((standard.mean(1) - 0.5 * standard.var(1, ddof=1)).tolist())


@pytest.mark.parametrize("kind", ["kl", "chi2", "sqrt_chi2"])
def test_the_divergence_in_the_reward_is_paid_after_the_clip(kind: str) -> None:
    settings = {"clip": {"range": 0.5}, "divergence": {"kind": kind, "coefficient": 0.3, "placement": "reward"}}
    inputs = make_inputs()
    assert inputs.ref_logprobs is not None
    paid = pipeline(settings)(inputs).ledger.contributions["reward/divergence"]
    log_ratio = torch.where(MASK, inputs.logprobs - inputs.ref_logprobs, 0).double().sum(1)
    chi2 = sequence_divergence(inputs.logprobs.double(), inputs.ref_logprobs.double(), MASK).chi2.mean()
    expected = {"kl": log_ratio, "chi2": log_ratio.expm1(), "sqrt_chi2": log_ratio.expm1() / (2 * chi2.sqrt())}[kind]
    assert log_ratio.abs().max() < 10
    torch.testing.assert_close(paid, -0.3 * expected, rtol=1e-6, atol=1e-6)


def test_the_divergence_is_in_reward_or_loss_and_never_in_both() -> None:
    in_loss = pipeline({"divergence": {"kind": "chi2", "coefficient": 0.3}})(make_inputs())
    assert torch.equal(in_loss.token_rewards, pipeline({})(make_inputs()).token_rewards)
    settings = {"kind": "chi2", "coefficient": 0.3, "placement": "reward"}
    with pytest.raises(ValueError, match=r"needed for shaping\.divergence"):
        pipeline({"divergence": settings})(make_inputs(ref_logprobs=None))


def test_own_terms_stand_where_they_say_and_keep_their_statistics() -> None:
    first, last = {**OWN, "name": "first", "after": "proxy"}, {**OWN, "name": "last", "after": "clip"}
    settings = {"terms": [last, first], "clip": {"range": 0.5}}
    steady, stopped = pipeline(settings), pipeline(settings)
    names = list(steady(make_inputs(0)).ledger.contributions)
    assert names[:2] == ["reward/proxy", "reward/first"]
    assert names[names.index("reward/clip") + 1] == "reward/last"
    stopped(make_inputs(0))
    resumed = pipeline(settings)
    resumed.load_state_dict(stopped.state_dict())
    assert torch.equal(resumed(make_inputs(1)).token_rewards, steady(make_inputs(1)).token_rewards)


@pytest.mark.parametrize("term", TERMS)
def test_no_term_reads_what_stands_at_masked_positions(term: str) -> None:
    settings = {"combine": "mean", "energy_penalty": {"eta": 0}, **TERMS[term]}
    inputs = make_inputs(models=3)
    noise: dict[str, Any] = {
        name: torch.where(MASK, getattr(inputs, name), math.nan) for name in ("logprobs", "ref_logprobs")
    }
    assert MASK.shape == (B, S - 1)
    clean, fuzzed = pipeline(settings)(inputs), pipeline(settings)(make_inputs(models=3, **noise))
    assert torch.equal(clean.token_rewards, fuzzed.token_rewards)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"terms": [{**OWN, "term": "own_terms:Missing"}]}, r"shaping\.terms\.bonus\.term = 'own_terms:Missing'"),
        ({"terms": [{**OWN, "term": "own_terms:NoTerm"}]}, "is no subclass of"),
        (
            {"terms": [{**OWN, "term": "own_terms:Needy"}]},
            "needs logits: expected of ref_logprobs, ref_energies",
        ),
        ({"terms": [{**OWN, "settings": {"bonus": -1}}]}, r"shaping\.terms\.bonus\.settings: .*\n.*bonus = -1"),
        ({"terms": [{**OWN, "settings": {}}]}, "bonus: required"),
        ({"terms": [OWN, OWN]}, "the name bonus is taken"),
        ({"terms": [{**OWN, "name": "clip"}]}, "the name clip is taken"),
        (
            {"terms": [{**OWN, "after": "nowhere"}]},
            "bonus.after = 'nowhere': expected one of proxy, latent",
        ),
        ({"latent_penalty": {"gamma": -1}}, "latent_penalty.gamma = -1"),
        ({"combine": "median"}, "combine = 'median'"),
        ({"uwo_lambda": -1}, "uwo_lambda = -1"),
        (
            {"divergence": {"kind": "kl", "coefficient": 0.1}, "kl": {"coefficient": 0.1}},
            "into the reward and into the loss at once",
        ),
        ({"divergence": {"kind": "chi2"}}, "set both, or neither"),
        ({"divergence": {"coefficient": 0.1}}, "set both, or neither"),
        ({"divergence": {"kind": "chi2", "coefficient": -1}}, "coefficient = -1"),
    ],
)
def test_bad_settings_are_refused_before_anything_runs(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        pipeline(settings)


@pytest.mark.parametrize(("combine", "models"), [("uwo", 1), ("wco", 1), ("single", 3)])
def test_the_number_of_reward_models_has_to_fit(combine: str, models: int) -> None:
    with pytest.raises(ConfigError, match=rf"rewards, shaping\.combine: .*{models} reward model"):
        pipeline({"combine": combine}).check_sources([Column(name="model")] * models, 0)


@pytest.mark.parametrize(
    ("settings", "needs"),
    [
        ({"kl": {"report": False}}, set()),
        ({}, {"ref_logprobs"}),  # the KL is reported
        ({"kl": {"report": False, "coefficient": 0.1}}, {"ref_logprobs"}),
        ({"kl": {"report": False}, "divergence": {"kind": "chi2", "coefficient": 0.1}}, {"ref_logprobs"}),
        ({"kl": {"report": False}, "energy_penalty": {"eta": 1.0}}, {"ref_energies"}),
        ({"kl": {"report": False}, "latent_penalty": {"gamma": 1.0}}, {"latents"}),
        ({"kl": {"report": False}, "terms": [{"name": "drift", "term": "own_terms:Drift"}]}, {"ref_logprobs"}),
    ],
)
def test_only_what_some_term_reads_is_computed(settings: dict[str, Any], needs: set[str]) -> None:
    assert pipeline(settings).needs == needs


def test_a_term_that_works_in_place_has_its_own_row_and_one_of_another_shape_is_named() -> None:
    own = {"name": "mine", "term": "own_terms:InPlace"}
    inputs = make_inputs()
    contributions = pipeline({"terms": [own]})(inputs).ledger.contributions
    assert torch.equal(contributions["reward/proxy"], pipeline({})(inputs).ledger.contributions["reward/proxy"])
    assert contributions["reward/mine"].tolist() == pytest.approx([-1.0] * B)
    with pytest.raises(ValueError, match=r"reward/mine: shape \(6, 1\); expected a tensor of shape \(6,\)"):
        pipeline({"terms": [{**own, "term": "own_terms:WrongShape"}]})(inputs)
    with pytest.raises(ValueError, match=r"reward/mine: NoneType; expected a tensor of shape \(6,\)"):
        pipeline({"terms": [{**own, "term": "own_terms:Nothing"}]})(inputs)
    whole = pipeline({"terms": [{**own, "term": "own_terms:WholeNumbers"}]})(inputs).ledger.contributions
    assert (whole["reward/proxy"] + whole["reward/mine"]).tolist() == pytest.approx(inputs.mask.sum(1).tolist())


def test_own_code_may_lie_in_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine_alone.py").write_text("from own_terms import Bonus\n")
    settings = {"terms": [{**OWN, "term": "mine_alone:Bonus"}]}
    with pytest.raises(ConfigError, match="No module named 'mine_alone'"):
        pipeline(settings)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert "bonus" in pipeline(settings).terms
