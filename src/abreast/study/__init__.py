"""The effect of interventions on every stretch of layers, and of every regular plan."""

from typing import TYPE_CHECKING

from abreast.lazy import attach

if TYPE_CHECKING:
    from abreast.study.interventions import Study, StudyRow, best_by_depth, study, wins
    from abreast.study.settings import Changes, Grid, StudySettings
    from abreast.study.sweep import Sweep, SweepRow, study_cost, sweep

attach(__name__)
