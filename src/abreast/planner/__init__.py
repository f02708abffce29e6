"""Finding plans: measure every group, search, choose within a budget."""

from typing import TYPE_CHECKING

from abreast.lazy import attach

if TYPE_CHECKING:
    from abreast.planner.calibration import (
        Calibration,
        calibrate,
        candidates_of,
        search_texts,
        task_questions,
    )
    from abreast.planner.engines import ENGINES, Engine, loaded_by
    from abreast.planner.expected import Expected, expect, expected_work, likely_depth
    from abreast.planner.find import (
        Planned,
        check_depth,
        find_plan,
        keep_accuracy,
        per_engine,
        with_profile,
    )
    from abreast.planner.front import (
        DEFAULT_KL,
        DEFAULT_KL_IS,
        FRONT_FILE,
        STATS_FILE,
        Budget,
        Front,
        Profile,
        Stats,
        explain,
        kind_of,
    )
    from abreast.planner.measuring import measure, score, score_programs
    from abreast.planner.objective import KL, OBJECTIVES, OF_TASKS, Cost, Objective, Scoring
    from abreast.planner.profiling import (
        PROFILED_TOKENS,
        NoisyTiming,
        ProfileSettings,
        estimated_profile,
        profile_here,
        saved_profile,
    )
    from abreast.planner.scoring import MIN_CALIBRATION_WINDOWS
    from abreast.planner.search import Costs, additive, contiguous
    from abreast.planner.settings import CalibrationSettings, Search

attach(__name__)
