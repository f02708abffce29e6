"""What a run produced, read back and shown: report page, charts, model card, Hub."""

from typing import TYPE_CHECKING

from abreast.lazy import attach

if TYPE_CHECKING:
    from abreast.report.card import write_card
    from abreast.report.choices import Choice, Choices, read_choices
    from abreast.report.drawings import (
        check_drawing,
        draw_bench,
        draw_costs,
        draw_front,
        draw_healing,
        draw_losses,
        draw_study,
    )
    from abreast.report.hub import prepare, push
    from abreast.report.page import PAGE, check_extra, numbers, write_report
    from abreast.report.records import read_run

attach(__name__)
