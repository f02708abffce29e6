"""Models in memory: loading, running under a plan, running changed models step by step, scoring."""

from typing import TYPE_CHECKING

from abreast.lazy import attach

if TYPE_CHECKING:
    from abreast.model.grouping import (
        apply,
        branches_of,
        decoder_layers,
        grouped,
        inference,
        keeps_last,
        load,
        load_tokenizer,
        named_dtype,
        remove,
    )
    from abreast.model.losses import (
        divergence,
        kl_under,
        logits_of,
        next_token_loss,
        weighted_mean,
    )
    from abreast.model.programs import (
        INTERVENTIONS,
        Program,
        advance,
        capture,
        cases,
        cost_of,
        geometry,
        name_of,
        run_programs,
        shared_steps,
        split,
    )
    from abreast.model.scores import token_scores

attach(__name__)
