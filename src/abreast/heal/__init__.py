"""Repairing the quality of a converted model: closed-form refit and self-distillation."""

from typing import TYPE_CHECKING

from abreast.lazy import attach

if TYPE_CHECKING:
    from abreast.heal.healing import Healed, heal
    from abreast.heal.least_squares import Refit, memory_needed
    from abreast.heal.recipe import FOLDS, RECIPES, Recipe
    from abreast.heal.ridge import moments_pair, solve
    from abreast.heal.setup import REFIT_TOKENS
    from abreast.heal.train import Distilled, step_seconds

attach(__name__)
