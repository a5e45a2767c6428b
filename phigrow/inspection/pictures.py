"""Pictures of grown matrices: blocks that are copied, tiled, scaled, means, new values or zero.

They are drawn as rectangles from the plan's spans, so that a matrix of 26 million values costs as much as one of 26.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np

from phigrow.errors import GrowthError
from phigrow.files.paths import user_path
from phigrow.files.picture import write_picture
from phigrow.growth.axis_groups import stored_label
from phigrow.growth.origins import SIDES, Anatomy, Kind, Part, anatomy, combine
from phigrow.growth.plan import Plan

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    Gains: TypeAlias = list[tuple[Text, "Block"]]

COLOURS = {
    # Okabe and Ito: copies in blues, scaled copies in oranges; the lighter one of each is a further copy.
    Kind.COPIED: "#0072B2",
    Kind.TILED: "#8CC5E8",
    Kind.SCALED: "#D55E00",
    Kind.TILED_SCALED: "#F5BE84",
    Kind.MEAN: "#009E73",
    Kind.MIXED: "#CC79A7",
    Kind.FRESH: "#D9D9D9",
    Kind.ZERO: "#FFFFFF",
    Kind.CONSTANT: "#F0E442",
}
LABELS = {
    Kind.COPIED: "copied",
    Kind.TILED: "tiled (further copies)",
    Kind.SCALED: "copied, scaled",
    Kind.TILED_SCALED: "tiled, scaled",
    Kind.MEAN: "mean of the source",
    Kind.MIXED: "mixture of the source",
    Kind.FRESH: "fresh random",
    Kind.ZERO: "zero",
    Kind.CONSTANT: "constant",
}
HATCHES = {Kind.ZERO: "////", Kind.FRESH: "\\\\\\", Kind.MEAN: "xxxx", Kind.MIXED: "----"}
"""Hatches, so that kinds differ in a grey print too. Dots would make an SVG ten times as large."""

DARK = (Kind.COPIED, Kind.SCALED, Kind.MEAN)
MOST_HEADS = 64
MOST_PANELS = 12
"""More would be too small to read."""
GAP = 3
"""Pixels between two numbers of an axis."""
MOST_PARTED = 24
"""Blocks of one kind that get an edge of their own; with more, edges would hide the blocks."""

STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 8,
    "axes.titlesize": 8.5,
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 8,
    "axes.linewidth": 0.8,
    "axes.edgecolor": "#444444",
    "hatch.linewidth": 0.5,
    "svg.hashsalt": "phigrow",
}


Limits = Sequence[tuple[int, int]]


class Block(NamedTuple):
    """A rectangle of one kind and gain: rows and columns ``start .. stop``."""

    rows: tuple[int, int]
    columns: tuple[int, int]
    kind: Kind
    gain: float

    @property
    def area(self) -> int:
        return (self.rows[1] - self.rows[0]) * (self.columns[1] - self.columns[0])


def blocks(anatomy: Anatomy) -> list[Block]:
    """The tensor as rectangles of one kind and gain that cover it once; a vector is one column wide."""
    recipe, count = anatomy.recipe, anatomy.recipe.diagonal_blocks
    sides = anatomy.sides[0], anatomy.sides[-1]
    rows, columns = (_split(pieces(side.whole), side.whole.size // count) for side in sides)
    if len(anatomy.sides) == 1:
        columns = [(0, 1, Kind.COPIED, 1.0)]
    drawn = []
    for (top, bottom, one, row_gain), (left, right, other, column_gain) in itertools.product(rows, columns):
        off = count > 1 and top // (recipe.shape[0] // count) != left // (recipe.shape[1] // count)
        kind = Kind.ZERO if off else combine(one, other)
        has_gain = kind.is_copy or kind in (Kind.MEAN, Kind.CONSTANT)
        drawn.append(Block((top, bottom), (left, right), kind, row_gain * column_gain if has_gain else 1.0))
    return drawn


def _split(whole: list[tuple[int, int, Kind, float]], size: int) -> list[tuple[int, int, Kind, float]]:
    """The pieces cut at every multiple of a size."""
    pieces = []
    for start, stop, kind, gain in whole:
        edges = [start, *range((start // size + 1) * size, stop, size), stop]
        pieces += [(low, high, kind, gain) for low, high in itertools.pairwise(edges)]
    return pieces


def pieces(part: Part) -> list[tuple[int, int, Kind, float]]:
    """(start, stop, kind, gain) of a stored axis: its spans, joined where only the source jumps."""
    joined: list[tuple[int, int, Kind, float]] = []
    for span in part.spans:
        if joined and joined[-1][2:] == (span.kind, span.gain):
            joined[-1] = (joined[-1][0], span.stop, span.kind, span.gain)
        else:
            joined.append((span.start, span.stop, span.kind, span.gain))
    return joined


def cut(block: Block, limits: Limits) -> Block | None:
    """The part of a block inside (rows, columns), or None."""
    (top, bottom), (left, right) = (
        (max(span[0], limit[0]), min(span[1], limit[1]))
        for span, limit in zip((block.rows, block.columns), limits, strict=True)
    )
    return Block((top, bottom), (left, right), block.kind, block.gain) if top < bottom and left < right else None


def default_tensors(plan: Plan) -> list[Anatomy]:
    """Return the matrices of layer 0 and those outside the layers, without keys and values, which look like queries."""
    family = plan.table
    matrices = [recipe for recipe in plan.recipes() if len(recipe.shape) == 2 and recipe.layer in (None, 0)]
    return [anatomy(each) for each in matrices if not {family.key, family.value} & set(each.written.axis)]


def picture(plan: Plan, tensors: Sequence[Anatomy]) -> Figure:
    """Draw the blocks of some tensors beside each other; of one alone, also one of its heads, enlarged.

    Args:
        plan: for the title, and the rotary part of a head.
        tensors: from `phigrow.growth.origins.matching` or `default_tensors`.

    Raises:
        GrowthError: too many tensors for a picture, or none.

    >>> save(picture(plan, default_tensors(plan)), "blocks.svg")  # doctest: +SKIP
    """
    import matplotlib

    if not 0 < len(tensors) <= MOST_PANELS:
        raise GrowthError(
            f"a picture cannot show {len(tensors)} tensors",
            where="the tensors of the picture",
            why=f"it has room for 1 to {MOST_PANELS}",
            fix="choose other tensors, such as --tensor 'model.layers.0.*.weight', or leave --tensor out",
        )
    with matplotlib.rc_context(STYLE):
        figure, gains = _single(plan, tensors[0]) if len(tensors) == 1 else _grid(plan, tensors)
        _legend(figure, tensors)
        figure.draw_without_rendering()  # puts everything in its place, so that it can be measured
        _fit_gains(gains)
        _fit_ticks(figure)
    return figure


def save(figure: Figure, path: str | Path) -> Path:
    """Write a figure as SVG, PDF or PNG (200 dots an inch), by the ending of ``path``; the same bytes every time.

    The file is written whole or not at all.

    Raises:
        GrowthError: as `write_picture`: another ending, a folder that is not there, a file that cannot be written, or
            one that phigrow did not write.
    """
    return write_picture(figure, user_path(path), STYLE)


def heading(plan: Plan) -> str:
    """Method, options and the growth of the stream: ``tile, anchor edge, scale none: hidden 2048 → 2560``."""
    method = ", ".join([plan.method, *(f"{name} {value}" for name, value in plan.options.items())])
    noise = f", noise {plan.noise:g}" if plan.noise else ""
    stream = plan.table.residual
    return f"{method}{noise}: {stream} {plan.src_sizes[stream]} → {plan.dst_sizes[stream]}"


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _grid(plan: Plan, tensors: Sequence[Anatomy]) -> tuple[Figure, Gains]:
    columns = min(3, len(tensors))
    rows = -(-len(tensors) // columns)
    figure = _figure(max(2.8 * columns, 5.6), 2.7 * rows + 0.75)
    figure.suptitle(heading(plan), fontsize=9.5)
    panels = figure.subplots(rows, columns, squeeze=False).flat
    gains: Gains = []
    for tensor, axes in itertools.zip_longest(tensors, panels):
        if tensor is None:
            axes.set_axis_off()
            continue
        recipe = tensor.recipe
        gains += _panel(axes, tensor, _short(recipe.name) + f"\n{_sizes(recipe.source_shape)} → {_sizes(recipe.shape)}")
        height, width = (*recipe.shape, 1)[:2]
        axes.set_box_aspect(float(np.clip(height / width, 0.6, 1.35)))
        axes.set_anchor("N")
    return figure, gains


def _single(plan: Plan, tensor: Anatomy) -> tuple[Figure, Gains]:
    recipe = tensor.recipe
    rows, columns = (*recipe.shape, 1)[:2]
    aspect = float(np.clip(rows / columns, 0.5, 1.35))
    head = _head(tensor)
    figure = _figure(6.4 if head else 4.6, (3.4 * aspect if len(tensor.sides) == 2 else 2.4) + 1.35)
    figure.suptitle(f"{recipe.name}\n{heading(plan)}", fontsize=8.5)
    title = f"{_sizes(recipe.source_shape)} → {_sizes(recipe.shape)}"
    if head is None:
        return figure, _panel(figure.subplots(), tensor, title)
    whole, enlarged = figure.subplots(1, 2, width_ratios=(1.6, 1))
    return figure, [*_panel(whole, tensor, title), *_enlarged(enlarged, plan, tensor, *head)]


def _short(name: str) -> str:
    """Return the part of a name that differs within a picture, such as ``layers.0.self_attn.q_proj``."""
    return name.removeprefix("model.").removesuffix(".weight")


def _sizes(shape: tuple[int, ...]) -> str:
    return " × ".join(map(str, shape))


def _panel(axes: Axes, tensor: Anatomy, title: str, window: tuple[int, tuple[int, int]] | None = None) -> Gains:
    """Draw the blocks; ``window`` (side, coordinates) is the part of a side to which an enlarged view is cut."""
    shape = (*tensor.recipe.shape, 1)[:2]
    limits = [(0, shape[0]), (0, shape[1])]
    if window is not None:
        limits[window[0]] = window[1]
    visible = [inside for block in blocks(tensor) if (inside := cut(block, limits)) is not None]
    _rectangles(axes, visible)
    axes.set_xlim(*limits[1])
    axes.set_ylim(limits[0][1], limits[0][0])
    axes.set_title(title, loc="left")
    axes.tick_params(length=2.5, width=0.6, color="#444444")
    axes.set_xticks([])
    for place, (side, word, axis) in enumerate(
        zip(tensor.sides, SIDES[len(tensor.sides)], (axes.yaxis, axes.xaxis), strict=False)
    ):
        is_window = window is not None and place == window[0]
        part = side.parts[-1] if is_window else side.whole
        ticks = _ticks(side.whole, limits[place])
        axis.set_label_text(f"{word}: {stored_label(part.name)}")
        axis.set_ticks(ticks, [str(tick - limits[place][0]) for tick in ticks])
        heads = _heads(side.parts)
        if not is_window and 1 < heads <= MOST_HEADS:
            line = axes.axhline if place == 0 else axes.axvline
            step = side.whole.size // heads
            for edge in range(step, side.whole.size, step):
                line(edge, color="#333333", linewidth=0.25, zorder=3)
    return _write_gains(axes, visible)


def _rectangles(axes: Axes, visible: Sequence[Block]) -> None:
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path as Outline

    for kind in Kind:
        alike = [block for block in visible if block.kind == kind]
        if not alike:
            continue
        corners = [list(itertools.product(b.columns, b.rows)) for b in alike]
        outline = Outline.make_compound_path_from_polys(np.array(corners)[:, [0, 1, 3, 2]])
        # White edges part the gains of one colour where there is room for them; elsewhere an edge of the face's colour
        # closes the hairlines that renderers leave between neighbours.
        parted = len(alike) <= MOST_PARTED and len({block.gain for block in alike}) > 1
        edge, width = ("#FFFFFF", 0.6) if parted else (COLOURS[kind], 0.2)
        axes.add_patch(PathPatch(outline, facecolor=COLOURS[kind], edgecolor=edge, linewidth=width, zorder=1))
        if kind in HATCHES:
            hatch = PathPatch(
                outline, facecolor="none", edgecolor="#9A9A9A", linewidth=0, hatch=HATCHES[kind], zorder=1.5
            )
            axes.add_patch(hatch)


def _write_gains(axes: Axes, visible: Sequence[Block]) -> Gains:
    """Write every gain once, in the largest block that has it."""
    written: Gains = []
    for kind, gain in sorted({(b.kind, b.gain) for b in visible if b.gain != 1 or b.kind == Kind.CONSTANT}):
        block = max((b for b in visible if (b.kind, b.gain) == (kind, gain)), key=lambda b: b.area)
        text = axes.text(
            sum(block.columns) / 2,
            sum(block.rows) / 2,
            f"{gain:g}" if kind == Kind.CONSTANT else f"×{gain:.4g}",
            color="#FFFFFF" if kind in DARK else "#222222",
            ha="center",
            va="center",
            zorder=5,
        )
        text.set_bbox({"facecolor": COLOURS[kind], "edgecolor": "none", "pad": 1.0})  # over hatches and heads
        written.append((text, block))
    return written


def _fit_gains(gains: Gains) -> None:
    """Turn the gains that are wider than their block; drop those that do not fit either way (the legend has them)."""
    for text, block in gains:
        assert text.axes is not None
        corners = text.axes.transData.transform(list(zip(block.columns, block.rows, strict=True)))
        width, height = abs(corners[1] - corners[0])
        for degrees in (0, 90):
            text.set_rotation(degrees)
            box = text.get_window_extent()
            if box.width <= 0.92 * width and box.height <= 0.92 * height:
                break
        else:
            text.remove()


def _fit_ticks(figure: Figure) -> None:
    """Leave out the numbers below a picture that would touch the one before or the last one."""
    for axes in figure.axes:
        labels = [label for label in axes.get_xticklabels() if label.get_text()]
        if not labels:
            continue
        texts, shown = [label.get_text() for label in labels], labels[0].get_window_extent().x1
        last = labels[-1].get_window_extent().x0
        for place, label in enumerate(labels[1:-1], start=1):
            box = label.get_window_extent()
            if box.x0 < shown + GAP or box.x1 > last - GAP:
                texts[place] = ""
            else:
                shown = box.x1
        axes.set_xticks(axes.get_xticks(), texts)


def _ticks(part: Part, limits: tuple[int, int]) -> list[int]:
    """Return the ends, and the places where the kind or the gain changes, unless they are too close to read."""
    low, high = limits
    inner = [piece[0] for piece in pieces(part) if low < piece[0] < high]
    kept = [low]
    if len(inner) <= 8:
        for place in inner:
            if place - kept[-1] >= 0.07 * (high - low) and high - place >= 0.07 * (high - low):
                kept.append(place)
    return [*kept, high]


def _heads(parts: Sequence[Part]) -> int:
    """Heads in a composite axis such as (kv group q): all its parts but the last."""
    return int(np.prod([part.size for part in parts[:-1]], dtype=int))


def _head(tensor: Anatomy) -> tuple[int, tuple[int, int]] | None:
    """(side, coordinates) of the first head that copies something; None in a tensor without heads."""
    if len(tensor.sides) == 1 or tensor.recipe.is_zero:
        return None
    for place, side in enumerate(tensor.sides):
        heads = _heads(side.parts)
        if heads > 1:
            size = side.whole.size // heads
            copied = np.flatnonzero(side.whole.source >= 0)
            first = int(copied[0]) // size if len(copied) else 0
            return place, (first * size, (first + 1) * size)
    return None


def _enlarged(axes: Axes, plan: Plan, tensor: Anatomy, place: int, span: tuple[int, int]) -> Gains:
    size = span[1] - span[0]
    gains = _panel(axes, tensor, f"head {span[0] // size}, enlarged", (place, span))
    last = tensor.sides[place].parts[-1].name
    rotary = plan.dst_sizes["rotary"]
    if place != 0 or last not in (plan.table.query, plan.table.key) or not 0 < rotary < size:
        return gains
    edge = span[0] + rotary
    axes.axhline(edge, color="#222222", linewidth=0.9, linestyle=(0, (3, 2)), zorder=4)
    for k, (text, block) in enumerate(gains):
        if block.rows[0] < edge < block.rows[1]:  # off the line, into the larger side
            sides = (block.rows[0], edge), (edge, block.rows[1])
            gains[k] = text, block._replace(rows=max(sides, key=lambda side: side[1] - side[0]))
            text.set_y(sum(gains[k][1].rows) / 2)
    for centre, word in ((span[0] + rotary / 2, "rotary"), (span[0] + (rotary + size) / 2, "not rotary")):
        axes.annotate(word, (1.03, centre), xycoords=axes.get_yaxis_transform(), rotation=270, va="center", ha="left")
    return gains


def _legend(figure: Figure, tensors: Sequence[Anatomy]) -> None:
    from matplotlib.patches import Patch

    gains: dict[Kind, set[float]] = {}
    for block in (block for tensor in tensors for block in blocks(tensor)):
        gains.setdefault(block.kind, set()).add(block.gain)
    handles = [
        Patch(
            facecolor=COLOURS[kind],
            edgecolor="#9A9A9A" if kind in HATCHES else COLOURS[kind],
            hatch=HATCHES.get(kind),
            linewidth=0.5,
            label=LABELS[kind] + _gain_range(kind, gains[kind]),
        )
        for kind in Kind
        if kind in gains
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(3, len(handles)), frameon=False)


def _gain_range(kind: Kind, gains: set[float]) -> str:
    low, high = min(gains), max(gains)
    if (low, high) == (1, 1) or kind == Kind.CONSTANT:
        return ""
    return f" ×{low:.4g}" if low == high else f" ×{low:.4g} to ×{high:.4g}"
