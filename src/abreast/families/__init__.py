"""Model families: one row per model_type, and where a layer's branches are."""

from typing import TYPE_CHECKING

from abreast.lazy import attach

if TYPE_CHECKING:
    from abreast.families.branches import BRANCHES, Branches
    from abreast.families.table import (
        FAMILIES,
        Family,
        FamilyError,
        Matrix,
        all_tensors,
        complete,
        family_of,
        has_bias,
        head_dim_of,
        is_tied,
        layer_tensors,
        num_layers_of,
        outer_tensors,
        positive,
        sizes,
    )

attach(__name__)
