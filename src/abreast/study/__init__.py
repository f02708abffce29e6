"""The effect of interventions on every stretch of layers."""

from typing import TYPE_CHECKING

from abreast.lazy import attach

if TYPE_CHECKING:
    from abreast.study.findings import Row, best_by_depth
    from abreast.study.sweep import study

attach(__name__)
