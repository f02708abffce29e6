"""Which way is the better buy at equal speed, on made-up numbers."""

import pytest

from abreast.planner.objective import KL, Cost
from abreast.rivals.measured import Measured, at_equal_speed, caption


def row(method: str, depth: int, kl: float, speedup: float | None, refit: bool = False) -> Measured:
    cost = Cost(kl, 0.001, kl, 0.001, 1000)
    seconds = None if speedup is None else 1 / speedup
    return Measured(method, depth, "", cost, refit=refit, seconds=seconds, speedup=speedup)


# Leaving out two of ten layers takes 0.8 of the time for KL 0.4, four 0.6 of it for 1.0.
RIVALS = [row("sleb", 8, 0.4, 1 / 0.8), row("sleb", 6, 1.0, 1 / 0.6)]


def test_a_rival_at_our_speed_lies_between_its_measured_depths():
    ours = [row("planner", depth, 0.3, 1 / time) for depth, time in ((7, 0.7), (9, 0.9))]
    deep, shallow = at_equal_speed([*ours, *RIVALS], KL)
    assert (deep.ours.depth, deep.rival) == (9, "sleb")
    assert deep.value == pytest.approx(0.2)  # half way from the original
    assert shallow.value == pytest.approx(0.7)
    assert shallow.stderr == pytest.approx(0.001 / 2**0.5)
    assert [deep.verdict, shallow.verdict] == ["worse", "better"]


def test_a_plan_slower_than_the_original_loses_to_it():
    (pair,) = at_equal_speed([row("planner", 7, 0.3, 0.9), *RIVALS], KL)
    assert (pair.rival, pair.value, pair.verdict) == ("original", 0.0, "worse")
    slow = row("sleb", 9, 0.2, 0.95)  # noise has bent the line
    (pair,) = at_equal_speed([row("planner", 7, 0.1, 0.9), *RIVALS, slow], KL)
    assert (pair.rival, pair.value, pair.verdict) == ("original", 0.0, "worse")


def test_the_best_rival_counts_and_other_plans_abreast_are_none():
    others = [row("shortgpt", 8, 0.1, 1 / 0.8), row("contiguous", 8, 0.0, 1 / 0.8)]
    (pair,) = at_equal_speed([row("planner", 8, 0.2, 1 / 0.8), *RIVALS, *others], KL)
    assert (pair.rival, pair.value, pair.verdict) == ("shortgpt", 0.1, "worse")


@pytest.mark.parametrize(
    ("ours", "words"),
    [
        ([row("planner", 8, 0.2, 1.25)], "the better buy at depth 8: KL 0.2 against 0.4 of greedy"),
        ([row("planner", 8, 0.5, 1.25)], "nowhere the better buy. Layers left out are the better"),
        ([row("planner", 8, 0.4, 1.25)], "nowhere the better buy. Too close to tell at depth 8"),
        ([row("planner", 8, 0.4, 2.0)], "None that was measured is as fast as depth 8."),
        (
            [row("planner", 9, 0.1, 1.1), row("planner", 8, 0.5, 1.25)],
            "better buy at depth 9: KL 0.1 against 0.182 of greedy (SLEB) at 1.10x, depth 9. "
            "Layers left out are the better buy at depth 8",
        ),
        ([row("planner", 8, 0.4, 0.9)], "depth 8: KL 0.4 against 0 of the original at 0.90x"),
        ([row("planner", 8, 0.2, None)], "No decode speed is known"),
        ([row("planner", 8, 0.2, 1.25, refit=True)], "With both sides refitted, layers abreast"),
    ],
)
def test_the_caption_says_where_layers_abreast_are_the_better_buy(ours, words):
    again = [row("sleb", 8, 0.3, 1.25, refit=True)]
    assert words in caption([*ours, *RIVALS, *again], KL)


def test_rows_come_back_from_json_and_from_earlier_versions():
    first = row("sleb", 8, 0.4, 1.25)
    assert Measured.from_dict(first.to_dict(), depth=8) == first
    before = {"plan": "1+2", "kl": 0.1, "loss_increase": 0.0, "tokens": 9}
    assert Measured.from_dict(before, depth=5).method == "planner"
    with pytest.raises(ValueError, match="script"):
        Measured.from_dict({**before, "plan": "<script>"}, depth=5)
