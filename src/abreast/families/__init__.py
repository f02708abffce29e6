"""Model families: one row per model_type."""

from typing import TYPE_CHECKING

from abreast.lazy import attach

if TYPE_CHECKING:
    from abreast.families.formats import (
        DECI_CODE,
        FORMATS,
        MLX_CODE,
        Padding,
        as_ours,
        format_config,
        mlx_config,
        name_in,
        padding_in,
        rope_of,
    )
    from abreast.families.in_memory import with_usual_names
    from abreast.families.row import (
        CHOSEN_COUNTS,
        EXPERT_COUNTS,
        EXPERT_PLACES,
        Branches,
        Family,
        FamilyError,
        Matrix,
        Stack,
        all_tensors,
        expert_layers,
        has_bias,
        head_dim_of,
        is_tied,
        layer_configs,
        layer_tensors,
        num_layers_of,
        outer_tensors,
        positive,
        sizes,
    )
    from abreast.families.table import CONVERTIBLE, FAMILIES, complete, decoder_of, family_of
    from abreast.families.wrappers import (
        decoder_config,
        decoder_name,
        wrapped_config,
        wrapped_name,
        wrapper_of,
    )

attach(__name__)
