"""Quality: perplexity and divergence on text, accuracy on tasks, paired statistics."""

from typing import TYPE_CHECKING

from abreast.lazy import attach

if TYPE_CHECKING:
    from abreast.evaluate.accuracy import Evaluation
    from abreast.evaluate.samples import sample, shared
    from abreast.evaluate.tasks import Tasks, evaluate_tasks, find_tasks, local_data
    from abreast.evaluate.text import Comparison, Perplexity, check_tokenizers, compare, perplexity

attach(__name__)
