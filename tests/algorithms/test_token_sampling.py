"""Sampling: filters against brute force, draws against the distribution, the hash against Python's integers."""

import pytest
import torch
from scipy import stats
from torch import Tensor
from transformers import RepetitionPenaltyLogitsProcessor

from nemo_eppo.algorithms import sampling
from nemo_eppo.algorithms.sampling import (
    counter_hash,
    counter_uniform,
    filter_logits,
    keep_mask,
    repetition_slopes,
    sample_tokens,
)


def splitmix64(seed: int, counter: int) -> int:
    """The published generator in unbounded integers, as signed 64-bit."""
    limit = (1 << 64) - 1

    def mix(z: int) -> int:
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & limit
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & limit
        return z ^ (z >> 31)

    golden = 0x9E3779B97F4A7C15
    result = mix((mix((seed + golden) & limit) + golden * counter) & limit)
    return result - (1 << 64) if result >> 63 else result


def test_the_hash_is_splitmix64() -> None:
    seeds = [0, 1, -1, 2**62, -(2**63), 123456789]
    counters = [0, 1, 7, 2**31, 2**40, 3]
    hashed = counter_hash(torch.tensor(seeds), torch.tensor(counters)).tolist()
    assert hashed == [splitmix64(s & ((1 << 64) - 1), c) for s, c in zip(seeds, counters, strict=True)]


@pytest.mark.parametrize("along", ["positions", "seeds"])
def test_uniforms_are_uniform_and_independent_along_positions_and_seeds(along: str) -> None:
    n = 60_000
    moving, still = torch.arange(n), torch.zeros(n, dtype=torch.int64)
    uniforms = counter_uniform(still, moving) if along == "positions" else counter_uniform(moving, still)
    assert ((uniforms > 0) & (uniforms < 1)).all()
    counts = torch.histc(uniforms, 100, 0, 1)
    assert stats.chisquare(counts.numpy()).pvalue > 0.001
    bins = (uniforms * 16).long()
    pairs = torch.bincount(bins[:-1:2] * 16 + bins[1::2], minlength=256)  # neighbours
    assert stats.chisquare(pairs.numpy()).pvalue > 0.001
    assert abs(stats.pearsonr(uniforms[:-1], uniforms[1:]).statistic) < 4 / n**0.5


def test_uniforms_stay_inside_their_interval_at_the_extremes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "counter_hash", lambda seeds, positions: torch.tensor([0, -1]))  # no bit, every bit
    low, high = counter_uniform(torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)).tolist()
    assert 0 < low < high < 1


def test_draws_follow_the_softmax_distribution() -> None:
    logits = torch.tensor([1.0, -torch.inf, 0.0, 2.5, -1.0, -torch.inf])
    n = 40_000
    uniforms = counter_uniform(torch.full((n,), 5), torch.arange(n))
    counts = torch.bincount(sample_tokens(logits.expand(n, -1), uniforms), minlength=6)
    possible = torch.isfinite(logits)
    assert not counts[~possible].any()
    expected = logits.double().softmax(0)[possible] * n
    assert stats.chisquare(counts[possible].numpy(), expected.numpy()).pvalue > 0.001


def test_a_draw_inverts_the_cumulative_distribution() -> None:
    logits = torch.tensor([0.5, 0.25, 0.25]).log().expand(6, -1)
    uniforms = torch.tensor([0.0, 0.49, 0.51, 0.74, 0.76, 1 - 2.0**-53], dtype=torch.float64)
    assert sample_tokens(logits, uniforms).tolist() == [0, 0, 1, 1, 2, 2]


def test_impossible_tokens_are_never_drawn_even_at_the_extremes() -> None:
    logits = torch.full((4, 50_000), -torch.inf)
    logits[:, 10_000:40_000] = torch.randn(30_000)
    uniforms = torch.tensor([0.0, 2.0**-53, 0.5, 1 - 2.0**-53], dtype=torch.float64)
    drawn = sample_tokens(logits, uniforms)
    assert ((drawn >= 10_000) & (drawn < 40_000)).all()


def test_a_draw_does_not_depend_on_the_rest_of_the_batch() -> None:
    logits, seeds = torch.randn(32, 200), torch.arange(32)
    uniforms = counter_uniform(seeds, torch.full((32,), 9))
    drawn = sample_tokens(logits, uniforms)
    order = torch.randperm(32)
    assert torch.equal(sample_tokens(logits[order], uniforms[order]), drawn[order])
    assert all(sample_tokens(logits[i : i + 1], uniforms[i : i + 1]) == drawn[i] for i in range(32))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_logits_that_are_no_distribution_show_in_their_own_rows_log_prob(bad: float) -> None:
    logits = torch.zeros(3, 4)
    logits[1] = bad
    drawn = sample_tokens(logits, torch.full((3,), 0.5, dtype=torch.float64))
    assert drawn[0] == drawn[2] == 2
    assert 0 <= drawn[1] < 4
    assert logits.log_softmax(-1).gather(-1, drawn[:, None]).isfinite().flatten().tolist() == [True, False, True]


@pytest.mark.parametrize(("top_k", "top_p"), [(3, 1.0), (0, 0.61), (5, 0.79), (0, 1e-9), (100, 1.0), (1, 0.5)])
def test_filters_keep_the_set_found_by_brute_force(top_k: int, top_p: float) -> None:
    logits = torch.randint(-3, 3, (30, 12)).float()  # full of ties
    kept = keep_mask(logits, top_k, top_p)
    for row in range(30):
        ranked = sorted(range(12), key=lambda v: (-float(logits[row, v]), v))[: top_k or None]
        total = sum(float(logits[row, v].double().exp()) for v in ranked)
        wanted, mass = set(), 0.0
        for v in ranked:
            if mass < top_p * total:
                wanted.add(v)
            mass += float(logits[row, v].double().exp())
        assert set(kept[row].nonzero().flatten().tolist()) == (wanted if top_p < 1 else set(ranked))


def test_top_p_stops_as_soon_as_the_mass_is_reached() -> None:
    assert keep_mask(torch.zeros(4), 0, 0.5).tolist() == [True, True, False, False]


@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.9])
def test_top_p_keeps_what_sorting_the_whole_vocabulary_keeps(top_p: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """And sorts only the rows for which a sixteenth of the vocabulary, 25 tokens, is not enough or too close a call."""
    logits = torch.randn(60, 400) * torch.arange(60).div(10).unsqueeze(-1)  # from flat to peaked
    logits[::3] = logits[::3].round()  # ties
    logits[1, :] = torch.where(torch.arange(400) < 8, 0.0, -1e30)  # 4 of 8 hold just 0.5
    mass, order = logits.sort(dim=-1, descending=True, stable=True)
    counts = 1 + (mass.double().softmax(-1).cumsum(-1)[:, :-1] < top_p).sum(-1)
    kept = [set(tokens[:count].tolist()) for tokens, count in zip(order, counts, strict=True)]
    found, sort = [], sampling._sorted_cut

    def watched(rows: Tensor, top_k: int, top_p: float) -> tuple[Tensor, Tensor]:
        found.append(rows)
        return sort(rows, top_k, top_p)

    monkeypatch.setattr(sampling, "_sorted_cut", watched)
    assert [set(row.nonzero().flatten().tolist()) for row in keep_mask(logits, 0, top_p)] == kept
    wanted = [row for row in range(60) if len(kept[row]) > 25 or (row, top_p) == (1, 0.5)]
    assert 0 < len(wanted) < 60
    assert torch.equal(torch.cat(found), logits[wanted])


@pytest.mark.parametrize(("top_k", "top_p"), [(3, 1.0), (0, 0.5), (3, 0.5)])
def test_filters_do_not_hide_nan(top_k: int, top_p: float) -> None:
    logits = torch.randn(2, 20)
    logits[1, 4] = torch.nan
    assert filter_logits(logits, top_k, top_p).log_softmax(-1).isnan().any(-1).tolist() == [False, True]


def test_filtered_logits_are_minus_infinity_and_the_others_untouched() -> None:
    logits = torch.randn(2, 3, 20)
    filtered = filter_logits(logits, top_k=4, top_p=1.0)
    kept = torch.isfinite(filtered)
    assert (kept.sum(-1) == 4).all()
    assert torch.equal(filtered[kept], logits[kept])
    assert torch.equal(filter_logits(logits, 0, 1.0), logits)


@pytest.mark.parametrize("penalty", [0.7, 1.0, 1.8])
def test_a_repetition_penalty_is_that_of_transformers(penalty: float) -> None:
    draw = torch.Generator().manual_seed(1)
    logits, ids = torch.randn(4, 30, generator=draw, dtype=torch.float64), torch.randint(0, 30, (4, 12), generator=draw)
    seen = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, ids, True)
    expected = RepetitionPenaltyLogitsProcessor(penalty)(ids, logits)
    torch.testing.assert_close(logits * repetition_slopes(logits, seen, penalty), expected)
