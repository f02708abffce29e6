"""Plans: which consecutive layers run abreast, and which outputs each member sees.

A plan is an ordered partition of a model's layers into *stages*; a stage is one layer or a *group*
of p >= 2 consecutive layers with a *wiring*. The members of a group read one common input x; a
wiring says what else they read, as two p x p matrices: which attention sees which attention, and
which FFN sees which attention. No FFN's output is seen within a group.

- ``lp`` (Layer Parallelism, arXiv 2502.02790, section 3): every FFN sees all attentions;
- ``cqil`` with bypass distance d (CQIL, arXiv 2404.06709, section 3.2): FFN j sees attentions
  j-d .. j; d = 0 is CQIL without bypassing, d = p-1 full causal visibility;
- ``ff``: the attentions run in order, each seeing those before it, and the FFNs abreast, each
  seeing all attentions.

In lp and cqil no attention sees another. Only this file tests a wiring by name; everything else
follows from the matrices.

Shorthand: ``5+6`` is an lp group, ``7|8`` cqil with d = 0, ``7|8:1`` with d = 1, ``9~10`` ff;
groups are separated by spaces or commas. Layer numbers are zero-based and always explicit.
CQIL's names are read as well: ``P2 D1 S12 E30`` is cqil with bypass D (0 where left out) in groups
of P from layer S up to, and without, layer E. That E is no member follows from CQIL's own tables:
only so do P2 S12 E30 and P4 S14 E30 divide into groups, and 9 and 12 stages fewer out of 32 agree
with their latencies (-26.2 % and -37.4 %).
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from abreast.errors import AbreastError

Wiring = Literal["lp", "cqil", "ff"]
Norms = Literal["own", "split", "shared"]  # of a group's members, see `model.apply`
WIRING_NAMES = ("lp", "cqil", "cqil-full", "ff")  # for `Group.wired`
Sees = tuple[tuple[bool, ...], ...]
FOLDER = Path(__file__).with_name("plans")  # that come with the package
_MOST = 1 << 20  # characters of a plan file
# PyYAML lets out what its constructors of scalars raise, and recurses once per bracket.
_NOT_YAML = (yaml.YAMLError, ValueError, LookupError, TypeError, ArithmeticError, RecursionError)
_NUMBER = "[0-9]{1,9}"
_JOINED = {"lp": "+", "cqil": "|", "ff": "~"}
_GROUP = re.compile(
    rf"{_NUMBER}(?:(?:\+{_NUMBER})+|(?:~{_NUMBER})+|(?:\|{_NUMBER})+(?::{_NUMBER})?)"
)
_CQIL = re.compile(rf"(?:[PDSE]{_NUMBER}[\s,]*)+", re.IGNORECASE)


class _UniqueKeys(yaml.SafeLoader):
    """Refuses what YAML would resolve by letting the last of two equal keys win."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for index, key in enumerate(keys):
            if key in keys[:index]:
                mark = node.value[index][0].start_mark
                raise yaml.MarkedYAMLError(problem=f"key '{key}' twice", problem_mark=mark)
        return super().construct_mapping(node, deep)


class PlanError(AbreastError):
    """A plan that cannot be read or cannot be carried out."""


class Group(BaseModel):
    """A group of p >= 2 consecutive layers that read one common input.

    layers: zero-based layer numbers, ascending, without gaps. bypass: CQIL's distance d with
    0 <= d <= p-1; it has no meaning for other wirings and must be left at 0 there.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    layers: tuple[Annotated[int, Field(ge=0, strict=True)], ...]
    wiring: Wiring = "lp"
    bypass: Annotated[int, Field(ge=0, strict=True)] = 0

    @model_validator(mode="after")
    def _check(self) -> Group:
        name = self.shorthand
        if len(self.layers) < 2:
            raise ValueError(f"group {list(self.layers)} has fewer than 2 layers; a group needs 2")
        if list(self.layers) != sorted(set(self.layers)):
            raise ValueError(
                f"group {name} is not in ascending order; list each layer once, upwards"
            )
        if self.layers[-1] - self.layers[0] != len(self.layers) - 1:
            raise ValueError(f"group {name} is not consecutive; a group may not leave layers out")
        if self.wiring != "cqil" and self.bypass:
            raise ValueError(f"group {name}: bypass belongs to cqil wiring; remove it or use '|'")
        if self.bypass >= len(self.layers):
            raise ValueError(
                f"group {name}: bypass {self.bypass} exceeds the group; "
                f"at most {len(self.layers) - 1} for {len(self.layers)} layers"
            )
        return self

    @property
    def shorthand(self) -> str:
        text = _JOINED[self.wiring].join(map(str, self.layers))
        return f"{text}:{self.bypass}" if self.bypass else text

    @classmethod
    def wired(cls, layers: Sequence[int], name: str) -> Group:
        """A group by the name of its wiring; cqil has bypass 0, cqil-full bypass p-1."""
        if name in ("lp", "ff"):
            return cls.model_validate({"layers": tuple(layers), "wiring": name})
        bypass = len(layers) - 1 if name == "cqil-full" else 0
        return cls(layers=tuple(layers), wiring="cqil", bypass=bypass)

    @property
    def kind(self) -> str:
        """The wiring with its bypass distance: lp, cqil:0, cqil:1."""
        return f"cqil:{self.bypass}" if self.wiring == "cqil" else self.wiring

    @property
    def description(self) -> str:
        """The wiring in a sentence."""
        if self.wiring == "lp":
            return "lp: every FFN sees the sum of all attentions"
        if self.wiring == "ff":
            return "ff: attentions in order, every FFN sees the sum of all attentions"
        if not self.bypass:
            return "cqil: every FFN sees its own attention"
        return (
            f"cqil with bypass {self.bypass}: every FFN sees its own attention and those of up to "
            f"{self.bypass} layers before it"
        )

    @property
    def attention_sees(self) -> Sees:
        """[p, p], strictly lower: `[j][k]`, whether attention j reads the output of attention k."""
        size = range(len(self.layers))
        return tuple(tuple(self.wiring == "ff" and k < j for k in size) for j in size)

    @property
    def ffn_sees(self) -> Sees:
        """[p, p]: `[j][k]`, whether FFN j reads the output of attention k."""
        size = range(len(self.layers))
        if self.wiring != "cqil":
            return tuple(tuple(True for _ in size) for _ in size)
        return tuple(tuple(j - self.bypass <= k <= j for k in size) for j in size)

    @property
    def shares_ffn_input(self) -> bool:
        """Whether all FFNs read the same sum, so that one all-reduce before them serves all."""
        return len(set(self.ffn_sees)) == 1

    @property
    def is_in_order(self) -> bool:
        """Whether attentions read the outputs of others, so that they run one after another."""
        return any(map(any, self.attention_sees))

    @property
    def ffn_band(self) -> int | None:
        """The d for which FFN j sees attentions j-d .. j, or None where the FFNs share an input."""
        if self.shares_ffn_input:
            return None
        return max(j - row.index(True) for j, row in enumerate(self.ffn_sees))


class Block(NamedTuple):
    """A decoder layer of a converted checkpoint: the layers whose attentions and FFNs it holds.

    group: of which it is, or is a part; None for a layer that stands alone.
    """

    attentions: tuple[int, ...]
    ffns: tuple[int, ...]
    group: Group | None


class Plan(BaseModel):
    """An ordered partition of num_layers layers: the groups; every other layer stands alone.

    source, revision and sha256 say what model the plan was made for, and are None where that is
    unknown. sha256: of config and weights, see `checkpoint.model_hash`, or, in this package's, of
    weights alone, see `checkpoint.weights_hash`; `check_model` compares it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str | None = None
    revision: str | None = None
    sha256: str | None = None
    num_layers: Annotated[int, Field(ge=1, strict=True)]
    groups: tuple[Group, ...] = ()

    @model_validator(mode="after")
    def _check(self) -> Plan:
        owner: dict[int, str] = {}
        for group in self.groups:
            for layer in group.layers:
                if layer >= self.num_layers:
                    raise ValueError(
                        f"group {group.shorthand}: layer {layer} does not exist; "
                        f"the model has layers 0 to {self.num_layers - 1}"
                    )
                if layer in owner:
                    raise ValueError(
                        f"groups {owner[layer]} and {group.shorthand} overlap in layer {layer}; "
                        "a layer belongs to one group"
                    )
                owner[layer] = group.shorthand
        starts = [group.layers[0] for group in self.groups]
        if starts != sorted(starts):
            raise ValueError("groups are not in ascending order; list them from the first layer up")
        return self

    @classmethod
    def parse(cls, text: str, num_layers: int, **record: str | None) -> Plan:
        """Read the shorthand, for example ``"5+6 7|8:1"``, or CQIL's names. Raises PlanError."""
        if _CQIL.fullmatch(text.strip()):
            groups = _cqil_groups(text.strip(), num_layers)
            return cls._build({"num_layers": num_layers, "groups": groups, **record}, "plan")
        groups = []
        for word in text.replace(",", " ").split():
            if not _GROUP.fullmatch(word):
                raise PlanError(
                    f"plan: cannot read group '{word}'; write lp as 5+6, cqil as 5|6 or 5|6:1, "
                    "ff as 5~6"
                )
            body, _, bypass = word.partition(":")
            wiring = next(name for name, joined in _JOINED.items() if joined in body)
            groups.append(
                {
                    "layers": tuple(int(n) for n in body.split(_JOINED[wiring])),
                    "wiring": wiring,
                    "bypass": int(bypass or 0),
                }
            )
        return cls._build({"num_layers": num_layers, "groups": groups, **record}, "plan")

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a YAML plan file; unknown keys are refused. Raises PlanError."""
        try:
            with open(path, encoding="utf-8") as file:  # may be a pipe, or a device without an end
                text = file.read(_MOST)
            data = yaml.load(text, _UniqueKeys) if len(text) < _MOST else None
        except OSError as error:
            raise PlanError(f"plan file '{path}' cannot be read: {error.strerror}") from None
        except UnicodeDecodeError:
            raise PlanError(f"plan file '{path}' is not UTF-8 text; give a YAML plan") from None
        except _NOT_YAML as error:
            mark = getattr(error, "problem_mark", None)
            where = f" line {mark.line + 1}" if mark else ""
            problem = getattr(error, "problem", None) or "not valid"
            raise PlanError(f"plan file '{path}'{where} is not YAML: {problem}") from None
        if not isinstance(data, dict):
            raise PlanError(f"plan file '{path}' must hold the keys num_layers and groups")
        return cls._build(data, f"plan file '{path}'")

    @classmethod
    def known(cls, weights: str) -> dict[int, Plan]:
        """The plans of this package for the model with weights of this hash, by depth."""
        plans = (cls.load(file) for file in sorted(FOLDER.glob("*.yaml"), reverse=True))
        return {plan.depth: plan for plan in plans if plan.sha256 == weights}

    @classmethod
    def read(cls, argument: str, num_layers: int) -> Plan:
        """What a user typed after ``--plan``: shorthand, a file, or a plan of this package by name.

        Raises PlanError, also when a file's plan is for another number of layers.
        """
        path = Path(argument)
        if not re.search(r"[^\d+|~:,\s]", argument):
            return cls.parse(argument, num_layers)
        if not re.search(r"\.(ya?ml|json)$", argument) and not os.path.isfile(argument):
            if _CQIL.fullmatch(argument) or not re.fullmatch(r"[A-Za-z][\w.-]{,99}", argument):
                return cls.parse(argument, num_layers)
            named = {file.stem: file for file in sorted(FOLDER.glob("*.yaml"))}
            if argument not in named:
                raise PlanError(
                    f"no plan is named '{argument}'; choose from {', '.join(named)}, "
                    "or write groups such as 5+6"
                )
            path = named[argument]
        plan = cls.load(path)
        if plan.num_layers != num_layers:
            raise PlanError(
                f"plan file '{argument}' is for {plan.num_layers} layers, "
                f"the model has {num_layers}; make a plan for this model"
            )
        return plan

    def check_layers(self, num_layers: int) -> None:
        """Raise PlanError unless the plan is for a model of `num_layers` layers."""
        if self.num_layers != num_layers:
            raise PlanError(
                f"the plan is for {self.num_layers} layers, the model has {num_layers}; "
                "make a plan for this model"
            )

    def check_model(self, hashes: Collection[str], model: str) -> None:
        """Raise PlanError where the plan was made for another model than that of these hashes."""
        if self.sha256 is not None and self.sha256 not in hashes:
            raise PlanError(
                f"the plan was made for another model ({self.source or 'unknown'}) than '{model}'; "
                f"make one for this model, or give its groups alone: --plan '{self.shorthand}'"
            )

    def made_for(self, source: str, revision: str | None, sha256: str | None) -> Plan:
        """The same plan with this model on record."""
        return self.model_copy(update={"source": source, "revision": revision, "sha256": sha256})

    @classmethod
    def _build(cls, data: dict[str, Any], where: str) -> Plan:
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise PlanError(f"{where}: {_one_line(error)}") from None

    def save(self, path: str | Path) -> None:
        """Write the YAML plan file that `load` reads."""
        staging = Path(path).with_name(f".{Path(path).name}.new")
        staging.unlink(missing_ok=True)
        staging.write_text(self.to_yaml(), encoding="utf-8")
        os.replace(staging, path)  # not through a link that lies there

    def to_yaml(self) -> str:
        data = self.model_dump(mode="json", exclude_none=True)
        for group in data["groups"]:
            if group["wiring"] != "cqil":
                del group["bypass"]
        head = {key: value for key, value in data.items() if key != "groups"}
        # PyYAML writes \x85 and the like as they are, and reads them back as line breaks
        plain = all(str(value).isprintable() for value in head.values())
        lines = [yaml.safe_dump(head, sort_keys=False, allow_unicode=plain).rstrip()]
        lines.append("groups:" if data["groups"] else "groups: []")
        for group in data["groups"]:
            flow = yaml.safe_dump(group, default_flow_style=True, sort_keys=False, width=10_000)
            lines.append(f"  - {flow.strip()}")
        return "\n".join(lines) + "\n"

    @property
    def shorthand(self) -> str:
        return " ".join(group.shorthand for group in self.groups)

    @property
    def cqil_name(self) -> str | None:
        """Such as "P2 D1 S12 E30", for a plan that is one stretch of equal cqil groups."""
        if not self.groups:
            return None
        first, last = self.groups[0], self.groups[-1]
        size, start, end = len(first.layers), first.layers[0], last.layers[-1] + 1
        uniform = {(g.wiring, g.bypass, len(g.layers)) for g in self.groups}
        if uniform != {("cqil", first.bypass, size)} or end - start != size * len(self.groups):
            return None
        return f"P{size} D{first.bypass} S{start} E{end}"

    @property
    def label(self) -> str:
        """The shorthand, with CQIL's name after it where there is one."""
        name = self.cqil_name
        return f"{self.shorthand} ({name})" if name else self.shorthand

    @property
    def stages(self) -> tuple[tuple[int, ...], ...]:
        """The layers of every stage in order; a stage of one layer has one number."""
        first = {group.layers[0]: group.layers for group in self.groups}
        grouped = {layer for group in self.groups for layer in group.layers}
        return tuple(
            first.get(layer, (layer,))
            for layer in range(self.num_layers)
            if layer in first or layer not in grouped
        )

    @property
    def ungrouped(self) -> Plan:
        """The plan of the original: every layer stands alone."""
        return self.model_copy(update={"groups": ()})

    @property
    def depth(self) -> int:
        """Effective depth: the number of stages."""
        return len(self.stages)

    def group_of(self, stage: Sequence[int]) -> Group | None:
        """The group that a stage of `stages` is, or None for a single layer."""
        return next((g for g in self.groups if g.layers == tuple(stage)), None)

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The layers of a checkpoint that is converted under this plan.

        A stage is one, wide where it is a group. Attentions that run in order each keep a layer of
        their own instead, and the last of these has all the group's FFNs.
        """
        return self.blocks_with(own_attentions=False)

    def blocks_with(self, *, own_attentions: bool) -> tuple[Block, ...]:
        """`blocks`; with own_attentions, those that read the same input keep a layer each, too."""
        blocks: list[Block] = []
        for stage in self.stages:
            group, together = self.group_of(stage), stage
            if group is not None and (own_attentions or group.is_in_order):
                blocks += [Block((layer,), (), group) for layer in stage[:-1]]
                together = stage[-1:]
            blocks.append(Block(together, stage, group))
        return tuple(blocks)

    def edge_groups(self) -> tuple[Group, ...]:
        """Groups that hold the first or the last layer, where quality is known to collapse."""
        edges = {0, self.num_layers - 1}
        return tuple(group for group in self.groups if edges & set(group.layers))


def _cqil_groups(text: str, num_layers: int) -> list[dict[str, Any]]:
    """The groups that CQIL's names stand for. Raises PlanError."""
    pairs = re.findall(rf"([PDSE])({_NUMBER})", text.upper())
    values = {"D": 0} | {letter: int(number) for letter, number in pairs}
    if len({letter for letter, _ in pairs}) < len(pairs) or not {*"PSE"} <= values.keys():
        raise PlanError(
            f"plan '{text}': CQIL's names are P (layers per group), D (bypass distance, 0 "
            "where left out), S (first layer) and E (the layer after the last), each once"
        )
    size, start, end = values["P"], values["S"], values["E"]
    if size < 2 or end <= start or (end - start) % size:
        raise PlanError(f"plan '{text}': P must be at least 2, and E - S a multiple of it")
    if end > num_layers:
        raise PlanError(f"plan '{text}': the model has {num_layers} layers, so E is at most that")
    return [
        {"layers": tuple(range(first, first + size)), "wiring": "cqil", "bypass": values["D"]}
        for first in range(start, end, size)
    ]


def _one_line(error: ValidationError) -> str:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        return f"unknown key '{where}'; remove it"
    if first["type"] == "missing":
        return f"key '{where}' is missing; add it"
    return f"{where}: {message}" if where and first["type"] != "value_error" else message
