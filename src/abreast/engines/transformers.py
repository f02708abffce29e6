"""transformers' own command line, which here knows converted checkpoints.

`python -m abreast.engines.transformers serve OUT` is `transformers serve OUT`, which looks up the
model class by name in the transformers package and so finds neither registered classes nor those
in a checkpoint; here they are put where it looks.
"""

from __future__ import annotations


def main() -> None:
    import transformers
    from transformers.cli.transformers import main as command_line

    from abreast import modeling

    for family in modeling.FAMILIES:
        name = f"Abreast{family}ForCausalLM"
        setattr(transformers, name, getattr(modeling, name))
    command_line()


if __name__ == "__main__":
    main()
