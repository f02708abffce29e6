"""transformers' own command line, with converted checkpoints known to it.

`python -m abreast.engines.transformers serve OUT` is `transformers serve OUT`. The latter looks the
model class up by name in the transformers package and so finds neither registered classes nor
those that a checkpoint brings along; here they are put where it looks.
"""

from __future__ import annotations

from abreast.families import CONVERTIBLE


def main() -> None:
    import transformers
    from transformers.cli.transformers import main as command_line

    from abreast import modeling

    for family in CONVERTIBLE.values():
        setattr(transformers, family.converted, getattr(modeling, family.converted))
    command_line()


if __name__ == "__main__":
    main()
