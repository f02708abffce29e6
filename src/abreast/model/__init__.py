"""Models in memory: loading, running under a plan, running changed models step by step, scoring."""

from typing import TYPE_CHECKING

from abreast.lazy import attach

if TYPE_CHECKING:
    from abreast.model.branches import GroupMember, by_name
    from abreast.model.devices import (
        check_device,
        fitting_dtype,
        is_native,
        loaded_dtype,
        named_dtype,
    )
    from abreast.model.forward import cache_in, cache_name, cache_of, keeps
    from abreast.model.grouping import (
        apply,
        branches_of,
        check_norms,
        decoder_layers,
        device_of,
        grouped,
        inference,
        load,
        load_tokenizer,
        remove,
    )
    from abreast.model.pace import Pace, minutes_text, pace_here, pace_of
    from abreast.model.programs import (
        INTERVENTIONS,
        Mapped,
        Program,
        advance,
        capture,
        cases,
        cost_of,
        geometry,
        name_of,
        planned,
        program_of,
        replaced,
        run_programs,
        shared_steps,
        split,
    )
    from abreast.model.reserved import keep_rows, reserve
    from abreast.model.scores import (
        Predictions,
        divergence,
        mean_kl,
        next_token_loss,
        predictions_of,
        scores_under,
        token_scores,
        weighted_mean,
    )

attach(__name__)
