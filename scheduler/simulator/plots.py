"""Plain charts as SVG text: bars and lines, nothing else. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 560, 300
LEFT, RIGHT, TOP, BOTTOM = 64, 150, 34, 40
COLOURS = (
    "#1b6ca8", "#d1495b", "#66a182", "#edae49", "#8d5a97", "#4f5d75", "#00798c", "#c06014", "#7a7a7a", "#2e933c",
    "#b5179e", "#000000",
)  # fmt: skip
TICKS = 5
Point = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Chart:
    """One chart of a page: SVG of WIDTH x HEIGHT, to be placed in a group."""

    body: str

    @classmethod
    def bars(cls, title: str, values: Sequence[tuple[str, float]]) -> Chart:
        """Horizontal bars from zero, each with its name and its value."""
        top = _nice(max((v for _, v in values if math.isfinite(v)), default=1.0))
        step = (HEIGHT - TOP - 12) / max(len(values), 1)
        inner = WIDTH - 140 - 60
        parts = [_title(title)]
        for i, (name, value) in enumerate(values):
            y = TOP + i * step
            length = max(inner * min(value / top, 1.0), 0.5) if math.isfinite(value) else 0.0
            parts.append(_text(134, y + step * 0.6, name, "end"))
            parts.append(
                f'<rect x="140" y="{y + step * 0.15:.1f}" width="{length:.1f}" height="{step * 0.65:.1f}" '
                f'fill="{COLOURS[i % len(COLOURS)]}"/>'
            )
            parts.append(_text(146 + length, y + step * 0.6, f"{value:.4g}"))
        return cls("".join(parts))

    @classmethod
    def lines(cls, title: str, lines: Mapping[str, Sequence[Point]], x_unit: str) -> Chart:
        """Lines over a common axis, from zero upwards. A line of one point is a dot."""
        points = [p for line in lines.values() for p in line if math.isfinite(p[1])]
        left = min((x for x, _ in points), default=0.0)
        right = max((x for x, _ in points), default=1.0)
        right = right if right > left else left + 1
        top = _nice(max((y for _, y in points), default=1.0))

        def place(point: Point) -> str:
            x = LEFT + (point[0] - left) / (right - left) * (WIDTH - LEFT - RIGHT)
            y = HEIGHT - BOTTOM - max(point[1], 0.0) / top * (HEIGHT - TOP - BOTTOM)
            return f"{x:.1f},{y:.1f}"

        parts = [_title(title), _axes(left, right, top, x_unit)]
        for i, (name, line) in enumerate(lines.items()):
            colour = COLOURS[i % len(COLOURS)]
            path = " ".join(place(p) for p in line if math.isfinite(p[1]))
            parts.append(
                f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.6" stroke-linecap="round"/>'
            )
            y = TOP + 6 + 15 * i
            parts.append(f'<rect x="{WIDTH - RIGHT + 10}" y="{y}" width="10" height="10" fill="{colour}"/>')
            parts.append(_text(WIDTH - RIGHT + 25, y + 9, name))
        return cls("".join(parts))


def page(title: str, charts: Sequence[Chart], columns: int = 2) -> str:
    """A whole SVG file."""
    count = -(-len(charts) // columns)
    width, height = WIDTH * columns, 30 + HEIGHT * count
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="11">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="12" y="20" font-size="14" font-weight="bold">{escape(title)}</text>',
    ]
    for i, chart in enumerate(charts):
        x, y = WIDTH * (i % columns), 30 + HEIGHT * (i // columns)
        parts.append(f'<g transform="translate({x},{y})">{chart.body}</g>')
    return "".join(parts) + "</svg>\n"


def _title(title: str) -> str:
    return f'<text x="12" y="20" font-size="12" font-weight="bold">{escape(title)}</text>'


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _axes(left: float, right: float, top: float, x_unit: str) -> str:
    bottom_y, right_x = HEIGHT - BOTTOM, WIDTH - RIGHT
    parts = []
    for i in range(TICKS + 1):
        y = bottom_y - i / TICKS * (bottom_y - TOP)
        parts.append(f'<line x1="{LEFT}" y1="{y:.1f}" x2="{right_x}" y2="{y:.1f}" stroke="#ddd"/>')
        parts.append(_text(LEFT - 6, y + 4, f"{top * i / TICKS:.4g}", "end"))
        x = LEFT + i / TICKS * (right_x - LEFT)
        unit = f" {x_unit}" if i == TICKS else ""
        parts.append(_text(x, bottom_y + 16, f"{left + (right - left) * i / TICKS:.4g}{unit}", "middle"))
    parts.append(f'<line x1="{LEFT}" y1="{bottom_y}" x2="{right_x}" y2="{bottom_y}" stroke="black"/>')
    return "".join(parts)


def _nice(top: float) -> float:
    """The next of 1, 2, 2.5, 5 times a power of ten."""
    if not top > 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(top))
    return next(factor * power for factor in (1, 2, 2.5, 5, 10, 20) if factor * power >= top)
