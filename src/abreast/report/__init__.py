"""What a run produced, read back and shown: report page, charts, model card, Hub."""

from typing import TYPE_CHECKING

from abreast.lazy import attach

if TYPE_CHECKING:
    from abreast.report.answers import open_models
    from abreast.report.card import prepare_upload, push, write_card
    from abreast.report.drawings import (
        check_drawing,
        draw_bench,
        draw_costs,
        draw_front,
        draw_healing,
        draw_losses,
        draw_study,
        draw_sweep,
    )
    from abreast.report.page import PAGE, check_extra, numbers, write_report
    from abreast.report.playground import build_page, check_gradio, serve
    from abreast.report.records import read_choices, read_run

attach(__name__)
