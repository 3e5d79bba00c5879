"""Small plots: inline SVG for the report, in the colours of the page's CSS variables, so that they follow its theme;
PNG for the tracker."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from crossguard.data.taxonomy import POSITIVE_FROM
from crossguard.train.evaluation.predictions import Predictions

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Inches; at 96 pixels an inch a panel fits a phone without being scaled.
SIZE = (3.4, 2.5)
MOST_POINTS = 300
OTHER_STYLES: tuple[str, ...] = ("--", ":", "-.")


class Colours(NamedTuple):
    """Of a plot."""

    ink: str
    muted: str
    rule: str
    accent: str


# matplotlib wants colours; each of these stands for a CSS variable of the page.
PLACEHOLDERS = Colours("#010101", "#020202", "#030303", "#040404")
VARIABLES = Colours("var(--ink)", "var(--muted)", "var(--rule)", "var(--accent)")
ON_WHITE = Colours("#1b1b1f", "#5f6068", "#d9d9de", "#1f5fbf")

# x and y values of a line.
Line = tuple[Sequence[float] | np.ndarray, Sequence[float] | np.ndarray]


@dataclass(frozen=True)
class Panel:
    """A plot that is drawn where it is shown."""

    title: str
    draw: Callable[[Axes, Colours], None]

    def svg(self) -> str:
        """An element of the page: text stays text, colours become variables, ids do not collide."""
        import matplotlib

        text = io.StringIO()
        with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": self.title, "font.family": "sans-serif"}):
            self._figure(PLACEHOLDERS).savefig(text, format="svg", transparent=True, metadata={"Date": None})
        svg = text.getvalue()
        svg = svg[svg.index("<svg") :]
        svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
        svg = re.sub(r'<g id="[^"]*">', "<g>", svg)
        svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg)  # inside HTML an address that nothing needs
        svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font: \1px var(--sans)", svg)
        for placeholder, variable in zip(PLACEHOLDERS, VARIABLES, strict=True):
            svg = svg.replace(placeholder, variable)
        label = self.title.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
        return svg.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)

    def png(self) -> bytes:
        """A picture on white."""
        data = io.BytesIO()
        self._figure(ON_WHITE).savefig(data, format="png", dpi=2 * 96)
        return data.getvalue()

    def _figure(self, colours: Colours) -> Figure:
        from matplotlib.figure import Figure

        figure = Figure(figsize=SIZE, layout="constrained")
        axes = figure.add_subplot()
        axes.set_title(self.title, loc="left", fontsize=9, color=colours.ink, pad=8)
        axes.tick_params(colors=colours.muted, labelsize=8, length=0)
        axes.xaxis.label.set(color=colours.muted, fontsize=8)
        axes.yaxis.label.set(color=colours.muted, fontsize=8)
        axes.grid(axis="y", color=colours.rule, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color(colours.rule)
        axes.locator_params(nbins=5)
        self.draw(axes, colours)
        return figure


def curve_panels(models: Mapping[str, Predictions], policy: str) -> list[Panel]:
    """Precision-recall and ROC of one policy: the first model in colour, the others (ablations, references) in grey.

    Args:
        models: name -> predictions on the same split; each must know positives and negatives of the policy.
    """
    from sklearn.metrics import precision_recall_curve, roc_curve

    precision_recall: dict[str, Line] = {}
    roc: dict[str, Line] = {}
    prevalence = 0.0
    for name, predictions in models.items():
        column = predictions.policies.index(policy)
        known = ~np.isnan(predictions.labels[:, column])
        labels = predictions.labels[known, column] >= POSITIVE_FROM
        scores = predictions.scores[known, column]
        precision, recall, _ = precision_recall_curve(labels, scores)
        precision_recall[name] = (recall, precision)
        roc[name] = roc_curve(labels, scores)[:2]
        prevalence = float(labels.mean())
    return [
        _curves(
            f"{policy}: precision and recall", precision_recall, ("recall", "precision"), ([0, 1], [prevalence] * 2)
        ),
        _curves(f"{policy}: ROC", roc, ("false positive rate", "true positive rate"), ([0, 1], [0, 1])),
    ]


def history_panel(title: str, lines: Mapping[str, Line], *, smooth: bool = False, mark: int | None = None) -> Panel:
    """Values over steps; the first line in colour.

    Args:
        smooth: draw a running mean over the raw values.
        mark: a step worth a vertical rule: the checkpoint that was evaluated.
    """

    def draw(axes: Axes, colours: Colours) -> None:
        if mark is not None:
            axes.axvline(mark, color=colours.rule, linewidth=1)
        for order, (name, (steps, values)) in enumerate(lines.items()):
            color = colours.accent if order == 0 else colours.muted
            steps, values = np.asarray(steps, dtype=float), np.asarray(values, dtype=float)
            if smooth and len(values) >= 20:
                axes.plot(*_thin(steps, values), color=color, linewidth=0.6, alpha=0.35)
                values = _running_mean(values, max(5, len(values) // 25))
            marker = "o" if len(values) < 12 else None
            axes.plot(*_thin(steps, values), color=color, linewidth=1.5, marker=marker, markersize=3, label=name)
        axes.set_xlabel("step")
        if len(lines) > 1:
            _legend(axes, colours)

    return Panel(title, draw)


def share_panel(title: str, lines: Mapping[str, Line], x: str, y: str, start: float | None = None) -> Panel:
    """Values over a share, or over something else of which 1 is a whole; the first line in colour. From `start` a thin
    line leads to 1: chance."""
    chance: Line = ([0, 1], [start, 1]) if start is not None else ([], [])
    return _curves(title, lines, (x, y), chance)


def reliability_panel(policy: str, points: Mapping[str, Sequence[Mapping[str, Any]]]) -> Panel:
    """Share of violations over the mean score of bins: calibrated in colour with exact intervals, raw in grey."""

    def draw(axes: Axes, colours: Colours) -> None:
        axes.plot([0, 1], [0, 1], color=colours.rule, linewidth=1)
        for name, color in (("raw", colours.muted), ("calibrated", colours.accent)):
            x, y = [point["score"] for point in points[name]], [point["rate"] for point in points[name]]
            axes.plot(x, y, "o-", color=color, linewidth=1.2, markersize=3, label=name)
            if name == "calibrated":
                ends = zip(*(point["interval"] for point in points[name]), strict=True)
                axes.vlines(x, *ends, color=color, linewidth=0.8)
        axes.set(xlabel="predicted", ylabel="violating", xlim=(0, 1), ylim=(0, 1.02), xticks=[0, 0.5, 1])
        _legend(axes, colours)

    return Panel(f"{policy}: reliability", draw)


def _curves(title: str, lines: Mapping[str, Line], names: tuple[str, str], chance: Line) -> Panel:
    def draw(axes: Axes, colours: Colours) -> None:
        right = max([1.0, *(max(x, default=1.0) for x, _ in lines.values())])
        axes.plot(*chance, color=colours.rule, linewidth=1)
        for order, (name, (x, y)) in reversed(list(enumerate(lines.items()))):
            style = "-" if order == 0 else OTHER_STYLES[(order - 1) % len(OTHER_STYLES)]
            color, width = (colours.accent, 1.8) if order == 0 else (colours.muted, 1.0)
            axes.plot(*_thin(np.asarray(x), np.asarray(y)), style, color=color, linewidth=width, label=name)
        axes.set(
            xlabel=names[0], ylabel=names[1], xlim=(0, right), ylim=(0, 1.02), xticks=[0, 0.5, 1], yticks=[0, 0.5, 1]
        )
        if len(lines) > 1:
            _legend(axes, colours)

    return Panel(title, draw)


def _legend(axes: Axes, colours: Colours) -> None:
    lines, names = axes.get_legend_handles_labels()
    axes.legend(lines[::-1], names[::-1], fontsize=7.5, frameon=False, labelcolor=colours.muted, handlelength=1.8)


def _thin(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most MOST_POINTS points of a line, its ends among them."""
    if len(x) <= MOST_POINTS:
        return x, y
    rows = np.linspace(0, len(x) - 1, MOST_POINTS).round().astype(int)
    return x[rows], y[rows]


def _running_mean(values: np.ndarray, width: int) -> np.ndarray:
    """The mean of the last `width` values, of fewer at the start."""
    sums = np.cumsum(np.concatenate([[0.0], values]))
    ends = np.arange(1, len(sums))
    starts = np.maximum(0, ends - width)
    return (sums[ends] - sums[starts]) / (ends - starts)
