"""How members are dealt to ranks, and when a rank repeats what others compute; in one process."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from abreast.checkpoint.tensors import open_checkpoint
from abreast.convert.rewrite import convert
from abreast.engines import torch_tp
from abreast.engines.ranks import Link, ParallelError, deal
from abreast.families import CONVERTIBLE


def counts(owners: tuple[tuple[int, ...], ...], world: int) -> list[int]:
    return [sum(rank in ranks for ranks in owners) for rank in range(world)]


def test_the_surplus_member_goes_where_least_is():
    loads = [0, 0]
    dealt = [counts(deal(3, loads, (1, 3)), 2) for _ in range(4)]
    assert dealt == [[2, 1], [1, 2], [2, 1], [1, 2]] and loads == [24, 24]
    loads = [0, 0, 0]
    for members in (4, 5, 3, 4, 4, 4):
        deal(members, loads, (1, 3))
    assert loads == [32, 32, 32]


def test_who_repeats_attentions_gets_fewer_members():
    loads = [100, 0]  # all wait for the slowest rank of a group, so that one counts first
    assert counts(deal(3, loads, (1, 3), band=1), 2) == [2, 1]
    assert loads == [100 + 2 * 4, 2 * 1 + 3]
    assert counts(deal(5, [0, 0, 0], (1, 3), band=1), 3) == [2, 2, 1]


@pytest.mark.parametrize("members", [4, 6])
def test_members_that_divide_are_shared_evenly(members):
    assert counts(deal(members, [9, 0], (1, 3), band=3), 2) == [members // 2] * 2
    assert deal(2, [0] * 4, (1, 3)) == ((0, 1), (2, 3))


@pytest.mark.parametrize(
    ("plan", "repeat", "attentions", "ffns"),
    [
        ("1+2+3 4+5+6", False, [3, 3], [3, 3]),
        ("1|2|3 4|5|6", False, [3, 3], [3, 3]),
        ("1|2|3:1 4|5|6:1", True, [4, 4], [4, 2]),
        ("1~2~3 4~5~6", False, [6, 6], [3, 3]),
    ],
)
def test_groups_of_a_checkpoint_are_balanced(
    tiny_checkpoint, tmp_path, plan, repeat, attentions, ffns
):
    convert(tiny_checkpoint(num_layers=8), plan, tmp_path / "out")
    config = open_checkpoint(tmp_path / "out").config
    layouts = [
        torch_tp.rank_layout(CONVERTIBLE["llama"], config, rank, 2, "replicate", repeat)
        for rank in range(2)
    ]
    members = [[one for one in layout.layers if one.layer is not None] for layout in layouts]
    assert [sum(one.attends for one in own) for own in members] == attentions
    assert [sum(one.feeds for one in own) for own in members] == ffns


@pytest.fixture
def alone():
    """A process group of this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Clock:
    """Time that passes only where something is said to take it."""

    def __init__(self, monkeypatch, attention: float, exchange: float) -> None:
        self.now, linear = 0.0, torch.nn.functional.linear

        def taking(x, matrix):
            self.now += attention / 4  # of which an attention has four
            return linear(x, matrix)

        def exchanging(x):
            self.now += exchange
            return x

        self.link = Link()
        monkeypatch.setattr(self.link, "sum", exchanging)
        monkeypatch.setattr(torch.nn.functional, "linear", taking)
        monkeypatch.setattr(torch_tp, "time", SimpleNamespace(perf_counter=lambda: self.now))


def repeating_pays(config, link: Link) -> bool:
    blocks = torch_tp.blocks_of(config)
    family = CONVERTIBLE["llama"]
    return torch_tp._repeating_pays(family, config, blocks, link, torch.float32, "cpu")


@pytest.mark.parametrize(
    ("bypass", "attention", "exchange", "pays"),
    [
        (1, 20e-6, 300e-6, True),  # a slow link
        (1, 300e-6, 20e-6, False),  # slow attentions
        (1, 20e-6, 30e-6, True),
        (2, 20e-6, 30e-6, False),  # two attentions take longer than the exchange
    ],
)
def test_the_faster_of_repeating_and_exchanging_is_chosen(
    tiny_checkpoint, tmp_path, monkeypatch, alone, bypass, attention, exchange, pays
):
    convert(tiny_checkpoint(), f"1|2|3:{bypass}", tmp_path / "out")
    config = open_checkpoint(tmp_path / "out").config
    clock = Clock(monkeypatch, attention, exchange)
    assert repeating_pays(config, clock.link) == pays


def test_a_rank_that_dies_while_links_are_timed_is_named(
    tiny_checkpoint, tmp_path, monkeypatch, alone
):
    def broken(*args):
        raise RuntimeError("Connection closed by peer [10.0.0.2]:4711")

    convert(tiny_checkpoint(), "1|2:1", tmp_path / "out")
    clock = Clock(monkeypatch, 1e-6, 1e-6)
    monkeypatch.setattr(dist, "all_reduce", broken)
    with pytest.raises(ParallelError, match="lost the connection to the other processes"):
        repeating_pays(open_checkpoint(tmp_path / "out").config, clock.link)
