"""The effect of interventions on every stretch of layers."""

from typing import TYPE_CHECKING

from abreast.lazy import attach

if TYPE_CHECKING:
    from abreast.study.sweep import Study, StudyRow, best_by_depth, study, wins

attach(__name__)
