"""Packs are full, balanced and complete; rows that share a pack do not see each other."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from distributed import run_ranks
from tiny import SP2, build_runner, random_batch
from torch import Tensor

from nemo_eppo.megatron import device
from nemo_eppo.megatron import packing as packing_module
from nemo_eppo.megatron.attention import CoreAttention
from nemo_eppo.megatron.packing import Packing, balanced_packs, sequence_numbers


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("multiple", [1, 2, 6])
def test_every_item_is_packed_once_within_the_budget_and_in_balance(seed: int, multiple: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.exp(torch.randn(64, generator=draw) * 0.8 + 4).long().clamp(1, 700).tolist()
    packs = balanced_packs(lengths, 1024, multiple, hidden_size=64)
    assert packs == balanced_packs(lengths, 1024, multiple, hidden_size=64)
    assert sorted(item for pack in packs for item in pack) == list(range(64))
    assert len(packs) % multiple == 0
    assert len(packs) < 2 * sum(lengths) / 1024 + multiple  # packs are at least half full
    assert max(sum(lengths[item] for item in pack) for pack in packs) <= 1024
    work = [sum(lengths[item] * (1 + lengths[item] / (12 * 64)) for item in pack) for pack in packs]
    largest = max(length * (1 + length / (12 * 64)) for length in lengths)
    assert max(work) - min(work) <= largest  # what dealing the longest first guarantees


def test_an_item_beyond_the_budget_is_packed_and_packs_may_stay_empty() -> None:
    assert balanced_packs([3, 9, 2, 4], 5, 1, 8) == [[1], [3, 0, 2]]
    assert balanced_packs([3], 5, 4, 8) == [[0], [], [], []]


def by_looking_at_every_pack(lengths: list[int], budget: int, multiple: int, hidden_size: int) -> list[list[int]]:
    """The rule word for word: longest first, to the least loaded pack with room, in the fewest packs that do."""
    for count in range(multiple, 1000, multiple):
        packs: list[list[int]] = [[] for _ in range(count)]
        for item in sorted(range(len(lengths)), key=lambda item: (-lengths[item], item)):
            room = [p for p in packs if sum(lengths[i] for i in p) + lengths[item] <= budget]
            if not room:
                break
            min(room, key=lambda p: sum(lengths[i] * (1 + lengths[i] / (12 * hidden_size)) for i in p)).append(item)
        else:
            return packs
    raise AssertionError


@pytest.mark.parametrize("around", [20, 34, 51, 90])  # percent of the budget; 34 and 51 leave much of each pack empty
@pytest.mark.parametrize("multiple", [1, 4])
def test_packs_are_those_of_the_rule_itself(around: int, multiple: int) -> None:
    for seed in range(20):
        draw = torch.Generator().manual_seed(seed)
        lengths = (around + torch.randn(40, generator=draw) * seed).long().clamp(1, 100).tolist()
        assert balanced_packs(lengths, 100, multiple, 8) == by_looking_at_every_pack(lengths, 100, multiple, 8)


class Counted(int):
    """A length that counts how often it is added to a pack's tokens, to deal it or to see whether it fits."""

    additions = 0

    def __radd__(self, other: int) -> int:
        Counted.additions += 1
        return int(self) + other


@pytest.mark.parametrize("around", [20, 51])
def test_the_work_of_packing_does_not_grow_with_the_square_of_the_rows(around: int) -> None:
    needed = []
    for rows in (500, 8000):
        noise = torch.randn(rows, generator=torch.Generator().manual_seed(0)) * 5
        Counted.additions = 0
        balanced_packs([Counted(length) for length in (around + noise).long().clamp(1, 100)], 100, 1, 8)
        needed.append(Counted.additions)
    assert needed[0] >= 500
    assert needed[1] < 2 * 16 * needed[0]  # sixteen times the rows; their square would be 256 times the work


@pytest.mark.parametrize("tail", [0, 7])
def test_unpacking_undoes_packing(tail: int) -> None:
    lengths, padded = torch.tensor([3, 5, 1]), torch.arange(1, 16).view(3, 5)
    packing = Packing(lengths, 5, 9 + tail)
    packed = packing.pack(padded, -1)
    assert packed.tolist()[0] == [1, 2, 3, 6, 7, 8, 9, 10, 11] + [-1] * tail
    assert packing.params.cu_seqlens_q.tolist() == [0, 3, 8, 9] + ([16] if tail else [])
    assert packing.params.max_seqlen_q == max(5, tail)
    values = packed.unsqueeze(-1).float().requires_grad_()
    unpacked = packing.unpack(values)
    inside = torch.arange(5) < lengths[:, None]
    assert torch.equal(unpacked[..., 0], torch.where(inside, padded, 0).float())
    unpacked.sum().backward()
    assert values.grad is not None
    assert values.grad[0, :, 0].tolist() == [1.0] * 9 + [0.0] * tail


@pytest.fixture
def rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "device", lambda: torch.device("meta"))  # whose tensors nobody can read
    monkeypatch.setattr(device, "tokens_multiple", lambda: 8)


@pytest.mark.usefixtures("rounding")
def test_attention_to_packed_rows_waits_for_nothing_on_the_device() -> None:
    from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_thd

    packing = Packing(torch.tensor([3, 5]), 5, 8)
    tokens = packing.pack(torch.zeros(2, 5, dtype=torch.long, device="meta"), 0)
    assert tokens.shape == sequence_numbers(tokens, packing.params).shape == (1, 8)
    query = torch.zeros(8, 4, 6, device="meta")
    alone: Any = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
    turned = _apply_rotary_pos_emb_thd(
        query, packing.params.cu_seqlens_q, torch.zeros(5, 1, 1, 6, device="meta"), cp_group=alone
    )
    config: Any = SimpleNamespace(window_size=None, window_attn_skip_freq=None)
    attention = CoreAttention(config, 1, config, "self")
    assert attention(turned, turned, turned, packed_seq_params=packing.params).shape == (8, 24)
    # the pack's own length would make Megatron's rotary positions run on from row to row
    assert packing.params.max_seqlen_q == 5


@pytest.mark.usefixtures("rounding")
def test_transformer_engine_gets_places_on_the_device_and_a_rounded_longest_row(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(packing_module, "has_transformer_engine", lambda: True)
    params = Packing(torch.tensor([3, 9, 1]), 9, 16).params
    assert params.cu_seqlens_q.is_meta
    assert params.cu_seqlens_q.shape == (5,)
    assert params.max_seqlen_q == params.max_seqlen_kv == 16


def one_row_changed(layout: dict[str, object]) -> tuple[Tensor, Tensor]:
    runner, rows = build_runner(layout, micro_batch_tokens=10**6), random_batch()
    arguments = (rows["lengths"], rows["targets"])
    before, _ = runner.infer(rows["tokens"], *arguments, outputs=2)
    changed = rows["tokens"].clone()
    changed[2] = changed[2].flip(0)
    after, _ = runner.infer(changed, *arguments, outputs=2)
    return before, after


@pytest.mark.parametrize(("layout", "ranks"), [({}, 1), (SP2, 2)], ids=["TP1", "TP2+SP"])
def test_a_row_changes_no_bit_of_the_others_in_its_pack(layout: dict[str, object], ranks: int) -> None:
    before, after = run_ranks(one_row_changed, ranks, layout)[0]
    others = torch.arange(len(before)) != 2
    assert torch.equal(before[others], after[others])
    assert not torch.equal(before[2], after[2])
