"""Quality: perplexity and divergence on text, accuracy on tasks, paired statistics."""

from typing import TYPE_CHECKING

from abreast.lazy import attach

if TYPE_CHECKING:
    from abreast.evaluate.statistics import ratio_of_means
    from abreast.evaluate.tasks import Evaluation, Tasks, evaluate_tasks, find_tasks, local_data
    from abreast.evaluate.text import (
        Comparison,
        Perplexity,
        check_length,
        check_stride,
        compare,
        first_difference,
        perplexity,
        sample,
        shared,
    )

attach(__name__)
