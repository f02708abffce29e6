"""A plan as a picture: per stage one small SVG, attention (A) and FFN (F) of every layer as boxes.

Colours come from classes, so that a page can theme them: box, attn, ffn, wire, node, label.
"""

from __future__ import annotations

from collections.abc import Mapping

from abreast.plan import Group, Plan

BOX, HEIGHT, PITCH = (34, 24, 34)  # width and height of a box, distance between members
LEAD, JOIN = 14, 40  # the wires before and after, and between attention and FFN of a group
GAP = 10  # and where one box follows another


def describe(stage: tuple[int, ...], group: Group | None) -> str:
    """A stage in words."""
    if group is None:
        return f"layer {stage[0]} alone"
    names = ", ".join(map(str, stage[:-1])) + f" and {stage[-1]}"
    return f"layers {names} abreast, {group.description}"


def stage_size(stage: tuple[int, ...], group: Group | None) -> tuple[int, int]:
    """Width and height of a stage's drawing."""
    in_order = group is not None and group.is_in_order
    width = 2 * (LEAD + BOX) + (JOIN if group is not None else GAP)
    more = len(stage) - 1
    return width + in_order * more * (BOX + GAP), more * PITCH + HEIGHT + 12


def draw_stage(stage: tuple[int, ...], group: Group | None) -> str:
    """The elements of a stage's drawing, without the svg element around them."""
    width, height = stage_size(stage, group)
    middle = height / 2
    rows = [6 + HEIGHT / 2 + PITCH * index for index in range(len(stage))]
    attentions = [(LEAD, row) for row in rows]
    if group is not None and group.is_in_order:
        attentions = [(LEAD + index * (BOX + GAP), middle) for index in range(len(stage))]
    attn_end, ffn = attentions[-1][0] + BOX, width - LEAD - BOX
    parts = [_wire(width - LEAD, row, width, middle) for row in rows]
    for left, row in attentions:
        parts.append(_wire(0 if left == LEAD else left - GAP, middle, left, row))
    if group is None:
        parts.append(_wire(attn_end, middle, ffn, middle))
    elif group.shares_ffn_input:
        joint = (attn_end + ffn) / 2
        parts += [
            _wire(left + BOX, row, joint, middle)
            for left, row in attentions
            if left == attentions[-1][0]
        ]
        parts += [_wire(joint, middle, ffn, row) for row in rows]
        parts.append(f'<circle class="node" cx="{joint:g}" cy="{middle:g}" r="8"/>')
        parts.append(_text("+", joint, middle))
    else:
        for row, seen in zip(rows, group.ffn_sees, strict=True):
            for other, visible in zip(rows, seen, strict=True):
                if visible:
                    parts.append(_wire(attn_end, other, ffn, row))
    boxes = [("A", "attn", attentions), ("F", "ffn", [(ffn, row) for row in rows])]
    for letter, kind, places in boxes:
        for layer, (left, row) in zip(stage, places, strict=True):
            parts.append(
                f'<rect class="box {kind}" x="{left}" y="{row - HEIGHT / 2:g}" '
                f'width="{BOX}" height="{HEIGHT}" rx="4"/>'
            )
            parts.append(_text(f"{letter}{layer}", left + BOX / 2, row))
    return "".join(parts)


def draw_plan(plan: Plan, colours: Mapping[str, str], width: int = 1200) -> str:
    """The whole plan as one SVG, its stages in lines of at most `width`.

    colours: paper, fg, wire, attn, ffn as CSS colours.
    """
    lines: list[list[tuple[tuple[int, int], str]]] = [[]]
    for stage in plan.stages:
        group = plan.group_of(stage)
        size = stage_size(stage, group)
        if sum(placed[0] for placed, _ in lines[-1]) + size[0] > width and lines[-1]:
            lines.append([])
        lines[-1].append((size, draw_stage(stage, group)))
    parts, top = [], 10.0
    for line in lines:
        tallest, left = max(height for (_, height), _ in line), 10.0
        for size, inner in line:
            at = f"translate({left:g} {top + (tallest - size[1]) / 2:g})"
            parts.append(f'<g transform="{at}">{inner}</g>')
            left += size[0]
        top += tallest + 14
    widest = 20 + max(sum(size[0] for size, _ in line) for line in lines)
    style = (
        f".box{{stroke:{colours['fg']};stroke-width:1}}.attn{{fill:{colours['attn']}}}"
        f".ffn{{fill:{colours['ffn']}}}.wire{{stroke:{colours['wire']};stroke-width:1.5;fill:none}}"
        f".node{{fill:{colours['paper']};stroke:{colours['wire']};stroke-width:1.5}}"
        f".label{{fill:{colours['fg']};font:12px sans-serif;text-anchor:middle}}"
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{widest:g}" height="{top:g}" '
        f'viewBox="0 0 {widest:g} {top:g}"><style>{style}</style>'
        f'<rect width="100%" height="100%" fill="{colours["paper"]}"/>{"".join(parts)}</svg>'
    )


def _wire(x1: float, y1: float, x2: float, y2: float) -> str:
    if y1 == y2:
        return f'<path class="wire" d="M{x1:g} {y1:g}H{x2:g}"/>'
    bend = (x1 + x2) / 2
    return f'<path class="wire" d="M{x1:g} {y1:g}C{bend:g} {y1:g} {bend:g} {y2:g} {x2:g} {y2:g}"/>'


def _text(text: str, x: float, y: float) -> str:
    return f'<text class="label" x="{x:g}" y="{y + 4:g}">{text}</text>'
