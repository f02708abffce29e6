"""Finding plans: measure every group, search, choose within a budget."""

from typing import TYPE_CHECKING

from abreast.lazy import attach

if TYPE_CHECKING:
    from abreast.planner.calibration import Calibration, calibrate, expect, measure
    from abreast.planner.find import (
        Planned,
        baselines,
        check_depth,
        draw_front,
        estimated_profile,
        find_plan,
        profile_here,
    )
    from abreast.planner.front import FRONT_FILE, Budget, Front, Profile, explain
    from abreast.planner.stats import STATS_FILE, Cost, Stats

attach(__name__)
