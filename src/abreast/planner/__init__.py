"""Finding plans: measure every group, search, choose within a budget."""

from typing import TYPE_CHECKING

from abreast.lazy import attach

if TYPE_CHECKING:
    from abreast.planner.calibration import Calibration, calibrate, expect, measure
    from abreast.planner.find import (
        NoisyTiming,
        Planned,
        Series,
        baselines,
        check_depth,
        estimated_profile,
        find_plan,
        profile_here,
    )
    from abreast.planner.front import (
        FRONT_FILE,
        STATS_FILE,
        Budget,
        CalibrationSettings,
        Front,
        Profile,
        Stats,
        explain,
    )
    from abreast.planner.objective import KL, Cost, Objective

attach(__name__)
