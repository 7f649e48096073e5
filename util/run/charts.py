"""Curves as inline SVG, which a browser shows without any library. Colours are the page's (CSS)."""

import math
import re
from html import escape

WIDTH, HEIGHT = 380, 210
LEFT, RIGHT, TOP, BOTTOM = 52, 10, 10, 24  # room for the axes
MOST = 200  # points of a curve
COLOURS = 8  # that the page has: classes c0 to c7
MANY = 40  # points, of which the largest few may be above the frame
ROOM = 0.06  # above and below the curves


def chart(title, series, line=None):
    """An HTML figure of curves.

    title: its caption. series: name -> list of (step, y, note), in the order of steps; the note is
    shown beside the value when the pointer is on it. line: (name, y) of a horizontal line, or None.
    """
    series = {name: thinned(points) for name, points in series.items() if points}
    values = [y for points in series.values() for _, y, _ in points]
    low, high = _range(values, [line[1]] if line else [])
    xs = [x for points in series.values() for x, _, _ in points]
    place = _Frame(min(xs), max(xs), low, high)
    parts = [place.axes()]
    if line:
        parts.append(place.line(*line))
    for number, (name, points) in enumerate(series.items()):
        parts.append(place.curve(number, name if len(series) > 1 else "", points))
    box = f'viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}"'
    key = _key(series, line)
    return (
        f"<figure><figcaption>{escape(title)}{key}</figcaption><svg {box}>{''.join(parts)}</svg>"
        "</figure>"
    )


def thinned(points, most=MOST):
    """At most so many of the points, evenly spread, the last one among them."""
    step = math.ceil(len(points) / most) or 1
    return points[(len(points) - 1) % step :: step]


def ticks(low, high, count=5):
    """About `count` round numbers from low to high."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * k for k in (1, 2, 5, 10) if power * k >= raw * 0.99)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [k * step for k in range(first, last + 1)]


def short(number):
    """A number in few characters."""
    if 1e4 <= abs(number) < 1e7:
        return f"{number:.0f}"
    return re.sub(r"e\+?(-?)0*", r"e\1", f"{number:.4g}")


def _range(values, more):
    """The lowest and highest y of a frame. Of many values, a few may be above it."""
    ordered = sorted(values)
    top = ordered[int(0.98 * (len(ordered) - 1))] if len(ordered) > MANY else ordered[-1]
    low, high = min([ordered[0], *more]), max([top, *more])
    room = ROOM * (high - low) or abs(high) * ROOM or 1
    bottom = low - room
    return (0 if low >= 0 > bottom else bottom), high + room


def _key(series, line):
    """Names of the curves, if there are several, and of the line."""
    names = [(f"c{i % COLOURS}", name) for i, name in enumerate(series)] if len(series) > 1 else []
    names += [("real", f"{line[0]} {short(line[1])}")] if line else []
    return "".join(f'<span class="key {kind}">{escape(name)}</span>' for kind, name in names)


class _Frame:
    """Where points are in the picture."""

    def __init__(self, left, right, low, high):
        self.left, self.right = left, right if right > left else left + 1
        self.low, self.high = low, high

    def x(self, value):
        share = (value - self.left) / (self.right - self.left)
        return round(LEFT + share * (WIDTH - LEFT - RIGHT), 1)

    def y(self, value):
        share = min(1.0, (value - self.low) / (self.high - self.low))
        return round(HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM), 1)

    def axes(self):
        base, ends = HEIGHT - BOTTOM, f'x1="{LEFT}" x2="{WIDTH - RIGHT}"'
        parts = [f'<line class="axis" {ends} y1="{base}" y2="{base}"/>']
        for value in ticks(self.low, self.high):
            y = self.y(value)
            parts.append(f'<line class="rule" {ends} y1="{y}" y2="{y}"/>')
            parts.append(f'<text x="{LEFT - 6}" y="{y + 3.5}" class="end">{short(value)}</text>')
        for value in filter(float.is_integer, map(float, ticks(self.left, self.right))):
            place = f'x="{self.x(value)}" y="{base + 16}"'
            parts.append(f'<text {place} class="middle">{short(value)}</text>')
        return "".join(parts)

    def line(self, name, value):
        y, title = self.y(value), f"<title>{escape(name)}: {short(value)}</title>"
        place = f'x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"'
        return f'<line class="real" {place}>{title}</line>'

    def curve(self, number, name, points):
        places = [(self.x(x), self.y(y)) for x, y, _ in points]
        path = " ".join(f"{x},{y}" for x, y in places)
        name = f"{escape(name)}, " if name else ""
        dots = "".join(
            f'<circle cx="{place[0]}" cy="{place[1]}" r="4"><title>{name}step {x}{escape(note)}: '
            f"{short(y)}</title></circle>"
            for place, (x, y, note) in zip(places, points, strict=True)
        )
        few = " few" if len(points) <= MANY else ""
        return f'<g class="c{number % COLOURS}{few}"><polyline points="{path}"/>{dots}</g>'
