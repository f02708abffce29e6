"""transformers' own command line, which here knows converted checkpoints.

`python -m abreast.engines.transformers serve OUT` is `transformers serve OUT`, which looks up the
model class by name in the transformers package and so finds neither registered classes nor those
in a checkpoint; here they are put where it looks.
"""

from __future__ import annotations

from contextlib import suppress


def main() -> None:
    from transformers.cli.transformers import main as command_line

    publish_classes()
    command_line()


def publish_classes() -> None:
    """Put the classes of all architectures that this transformers has into its package."""
    import transformers

    from abreast import modeling

    for name in modeling.ARCHITECTURES:
        with suppress(ValueError):  # what this version lacks; others can be served
            setattr(transformers, name, getattr(modeling, name))


if __name__ == "__main__":
    main()
