"""Plans chosen by an objective of the user's own."""

from __future__ import annotations

import numpy as np
import pytest

from abreast.data import TokenStream
from abreast.planner import Budget, CalibrationSettings, Objective, calibrate, explain, find_plan
from abreast.planner.front import reasons

GAIN = Objective(
    name="Gain",
    label="negative loss increase",
    unit="nats",
    value=lambda cost: -cost.loss_increase,
    stderr=lambda cost: cost.loss_stderr,
)


def test_an_objective_from_outside_ranks_candidates_plans_and_reasons(tiny_checkpoint, tmp_path):
    data = TokenStream(np.random.default_rng(0).integers(128, size=256), "random", 1, 256)
    calibration = calibrate(
        tiny_checkpoint(num_layers=8),
        tmp_path / "calibration",
        CalibrationSettings(
            num_windows=8, window=32, batch_size=4, max_group=2, wirings=("lp",), keep=0.6
        ),
        stream=data,
    )
    messages: list[str] = []
    planned = find_plan(
        calibration, tmp_path, Budget(depth=7), objective=GAIN, step=messages.append
    )
    costs = planned.front.plans
    assert planned.plan == max(costs, key=lambda plan: costs[plan].loss_increase)
    assert planned.plan != min(costs, key=lambda plan: costs[plan].kl)
    assert any(message.startswith("depth 7: Gain -") for message in messages)
    [row] = reasons(planned.plan, planned.front)
    assert row["gain"] == -planned.front.stats.groups[planned.plan.groups[0]].loss_increase
    assert row["extra_gain"] >= 0 and row["rank"] == 1
    page = explain(planned.plan, planned.front)
    assert f"costs Gain {-planned.expected.loss_increase:.5f}" in page and "| Gain alone |" in page
    # Of the candidates, those best by the objective were measured on all of the text.
    measured = {g: c for g, c in planned.front.stats.groups.items() if c.tokens == 8 * 31}
    assert len(measured) == 3 and planned.plan.groups[0] in measured
    assert row["gain_stderr"] == pytest.approx(planned.expected.loss_stderr)
