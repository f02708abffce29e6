"""Engines that plans may be for: which groups each of them loads.

What an engine refuses is in `targets`, what a format of `convert --format` cannot hold in
`convert`. Every target in each of its formats is a name for ``--for``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from abreast import targets
from abreast.convert import check_format
from abreast.errors import AbreastError
from abreast.families import FAMILIES, family_of, num_layers_of
from abreast.plan import Group, Plan
from abreast.targets import TRANSFORMERS, Target, Unpaired, refusals


@dataclass(frozen=True)
class Engine:
    """An engine, and the format in which it is given a conversion."""

    target: Target
    form: str = "auto"

    def refusal(
        self,
        config: Mapping[str, Any],
        plan: Plan,
        degree: int = 1,
        unpaired: Unpaired = "shard",
    ) -> str | None:
        """Why it does not load an original's conversion under a plan, None if it does.

        config: the original's. degree, unpaired: as in `refusals`.
        """
        family = FAMILIES.get(str(config.get("model_type")))
        try:
            if self.target is not TRANSFORMERS:  # which also runs what cannot be converted
                family = family_of(config)
            if self.form != "auto":
                check_format(self.form, config, family_of(config), plan, wrapped="within" in config)
                config = {**config, "abreast": {"format": self.form}}
        except AbreastError as error:
            return str(error)
        return next(refusals(self.target, config, family, plan, degree, unpaired), None)


ENGINES = {
    target.name.lower() + (f":{form}" if form != "auto" else ""): Engine(target, form)
    for target in vars(targets).values()
    if isinstance(target, Target)
    for form in target.formats
}


def loaded_by(
    names: Sequence[str],
    groups: Sequence[Group],
    config: Mapping[str, Any],
    degree: int = 1,
    unpaired: Unpaired = "shard",
) -> list[Group]:
    """The groups that all of these engines load at a tensor parallel degree.

    Raises AbreastError for an unknown name, and for an engine that loads none, with its reason.
    """
    if unknown := [name for name in names if name.lower() not in ENGINES]:
        raise AbreastError(f"engine '{unknown[0]}' is unknown; choose from {', '.join(ENGINES)}")
    count, left = num_layers_of(config), list(groups)
    for name in names:
        reasons = {
            group: ENGINES[name.lower()].refusal(
                config, Plan(num_layers=count, groups=(group,)), degree, unpaired
            )
            for group in left
        }
        left = [group for group, reason in reasons.items() if reason is None]
        if not left:
            raise AbreastError(f"{name} loads no such group: {next(iter(reasons.values()))}")
    return left
