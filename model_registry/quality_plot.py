"""The trade-off of size and accuracy as an SVG that needs no script, no font and no colour to be understood.

Shapes tell what a point is (square: published, ring: tried, cross: its gates did not hold), a line joins the front.
The picture has a title and a description; the same figures stand in a table beside it, which is the caller's duty.
Colours come from classes, so that a page's own sheet decides them; no inline style is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from model_registry.quality_report import Point

WIDTH, HEIGHT = 640, 320
LEFT, RIGHT, TOP, BOTTOM = 64, 24, 36, 48


def plot(points: Sequence[Point], name: str, key: str = "tradeoff") -> str:
    """The `<svg>` element for `points`; an empty string for none.

    `name` is the model's; `key` begins the ids inside and differs from that of another plot on the same page.
    """
    if not points:
        return ""
    x, y = _Axis.over([p.size_bytes / 1e6 for p in points]), _Axis.over([p.accuracy for p in points], most=1.0)
    front = sorted((p for p in points if p.is_on_front), key=lambda p: p.size_bytes)
    best = max(points, key=lambda p: p.accuracy)
    description = (
        f"{len(points)} points. Smallest: {min(p.size_bytes for p in points) / 1e6:.1f} MB. "
        f"Most accurate: {best.label}, {best.accuracy:.3f} at {best.size_bytes / 1e6:.1f} MB."
    )
    line = " ".join(f"{_x(x, p):.1f},{_y(y, p):.1f}" for p in front)
    parts = [
        f'<svg class="tradeoff" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-labelledby="{key}-t {key}-d">',
        f'<title id="{key}-t">Size and accuracy of {escape(name)}</title>',
        f'<desc id="{key}-d">{escape(description)}</desc>',
        *_grid(x, y),
        f'<polyline class="front" points="{line}"/>' if len(front) > 1 else "",
        *(_mark(p, _x(x, p), _y(y, p)) for p in points),
        *_labels([p for p in points if p.is_published], x, y),
        "</svg>",
    ]
    return "".join(parts)


class _Axis:
    """A range of values with some air around it, and its ticks."""

    def __init__(self, low: float, high: float) -> None:
        self.low, self.high = low, high

    @classmethod
    def over(cls, values: Sequence[float], most: float = float("inf")) -> _Axis:
        spread = max(values) - min(values) or max(abs(max(values)) * 0.2, 0.01)
        return cls(min(values) - 0.15 * spread, max(max(values), min(max(values) + 0.15 * spread, most)))

    def share(self, value: float) -> float:
        return (value - self.low) / (self.high - self.low)

    def ticks(self) -> list[float]:
        return [self.low + (self.high - self.low) * step / 4 for step in range(5)]


def _x(axis: _Axis, point: Point) -> float:
    return LEFT + axis.share(point.size_bytes / 1e6) * (WIDTH - LEFT - RIGHT)


def _y(axis: _Axis, point: Point) -> float:
    return HEIGHT - BOTTOM - axis.share(point.accuracy) * (HEIGHT - TOP - BOTTOM)


def _grid(x: _Axis, y: _Axis) -> list[str]:
    parts = []
    for value in x.ticks():
        at = LEFT + x.share(value) * (WIDTH - LEFT - RIGHT)
        parts.append(_text("tick", at, HEIGHT - BOTTOM + 18, "middle", f"{value:.3g}"))
    for value in y.ticks():
        at = HEIGHT - BOTTOM - y.share(value) * (HEIGHT - TOP - BOTTOM)
        parts.append(f'<line class="grid-line" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(_text("tick", LEFT - 8, at + 4, "end", f"{value:.3f}"))
    parts.append(_text("tick", (LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, "middle", "size (MB)"))
    parts.append(_text("tick", 8, 14, "start", "agreement with the source"))
    return parts


def _text(kind: str, x: float, y: float, anchor: str, text: str) -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _mark(point: Point, x: float, y: float) -> str:
    label = f"<title>{escape(point.label)}: {point.size_bytes / 1e6:.1f} MB, {point.accuracy:.3f}</title>"
    if not point.holds:
        cross = f"M{x - 4:.1f} {y - 4:.1f}l8 8m0 -8l-8 8"
        return f'<path class="mark failed" d="{cross}">{label}</path>'
    if point.is_published:
        return f'<rect class="mark published" x="{x - 5:.1f}" y="{y - 5:.1f}" width="10" height="10">{label}</rect>'
    return f'<circle class="mark tried" cx="{x:.1f}" cy="{y:.1f}" r="4">{label}</circle>'


def _labels(points: Sequence[Point], x: _Axis, y: _Axis) -> list[str]:
    """One label for points at the same place, turned to the inside near the right edge."""
    by_place: dict[tuple[int, int], list[Point]] = {}
    for point in points:
        by_place.setdefault((round(_x(x, point) / 14), round(_y(y, point) / 14)), []).append(point)
    parts = []
    for same in by_place.values():
        at, height = _x(x, same[0]), _y(y, same[0])
        anchor, shift = ("end", -10) if at > WIDTH * 0.6 else ("start", 8)
        text = same[0].label + (f" and {len(same) - 1} more" if len(same) > 1 else "")
        parts.append(_text("name", at + shift, height + (-8 if anchor == "end" else 18), anchor, text))
    return parts
