"""A procedure to scale, as a picture: who did what and when, and how long nobody ran."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from xml.sax.saxutils import escape

from ..state.report import Step

__all__ = ["draw"]

_WIDTH, _LEFT, _RIGHT, _LANE, _TOP, _BAR = 960, 110, 20, 64, 60, 26
_FONT = 'font-family="sans-serif" font-size="12"'
_COLOURS = {
    "suspend": "#c0392b",
    "device state": "#2980b9",
    "check": "#16a085",
    "place": "#b8860b",
    "start": "#27ae60",
    "resume": "#27ae60",
}
_OTHER, _UNDO, _FAILED, _NESTED = "#7f8c8d", "#e67e22", "#8e44ad", "#2c3e50"
#: After which a device is at work.
_GOING_ON = ("start", "resume", "undo: resume")
_TICKS = 6


def draw(title: str, lanes: Mapping[str, Sequence[Step]]) -> str:
    """An SVG picture of ``lanes``: a name and its steps, whose times are of one clock.

    The blackout is shaded: from the first ``suspend`` to the end of the last step that lets a device go on, or of all
    where there is none. Steps within others are drawn as thinner bars.
    """
    steps = [step for lane in lanes.values() for step in lane]
    if not steps:
        raise ValueError("nothing was done: there is nothing to draw")
    begin_s, end_s = min(step.begin_s for step in steps), max(step.end_s for step in steps)
    scale = _Scale(begin_s, max(end_s - begin_s, 1e-9))
    height = _TOP + _LANE * len(lanes) + 40
    dark_s = min((step.begin_s for step in steps if step.name == "suspend"), default=begin_s)
    light_s = max((step.end_s for step in steps if step.name in _GOING_ON), default=end_s)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}" {_FONT}>',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="{_LEFT}" y="20" font-size="15">{escape(title)}</text>',
        _rectangle(scale.x(dark_s), _TOP - 14, scale.x(light_s) - scale.x(dark_s), _LANE * len(lanes) + 14, "#eceff1"),
        f'<text x="{scale.x(dark_s) + 4:.1f}" y="{_TOP - 18}">blackout {_duration(light_s - dark_s)}</text>',
    ]
    parts += _axis(scale, _TOP + _LANE * len(lanes) + 14)
    for row, (name, lane) in enumerate(lanes.items()):
        y = _TOP + _LANE * row
        parts.append(f'<text x="8" y="{y + 18}">{escape(name)}</text>')
        parts += _lane(lane, y, scale)
    return "\n".join([*parts, "</svg>"]) + "\n"


class _Scale:
    def __init__(self, begin_s: float, width_s: float) -> None:
        self.begin_s = begin_s
        self.width_s = width_s

    def x(self, time_s: float) -> float:
        return _LEFT + (time_s - self.begin_s) / self.width_s * (_WIDTH - _LEFT - _RIGHT)


def _lane(lane: Sequence[Step], y: int, scale: _Scale) -> list[str]:
    """Bars, with a name where it fits: within its bar, or below it where nothing else stands."""
    parts = []
    free_x = 0.0
    # a step that has others within it ends after them, and must not hide them
    for step in sorted(lane, key=lambda step: (step.begin_s, -step.end_s)):
        if any(_within(step, other) for other in lane):
            parts.append(_nested(step, y, scale))
            continue
        x, width = scale.x(step.begin_s), max(scale.x(step.end_s) - scale.x(step.begin_s), 1.0)
        label = f"{step.name} {_duration(step.end_s - step.begin_s)}"
        bar = _rectangle(x, y, width, _BAR, _colour(step))
        tip = escape(label + (f": {step.failed}" if step.failed else ""))
        parts.append(f"<g>{bar}<title>{tip}</title></g>")
        room = 6.6 * len(label)
        if room < width:
            parts.append(f'<text x="{x + 4:.1f}" y="{y + 17}" fill="white">{escape(label)}</text>')
        elif x >= free_x and x + room < _WIDTH:
            parts.append(f'<text x="{x:.1f}" y="{y + _BAR + 14}">{escape(label)}</text>')
            free_x = x + room
    return parts


def _within(step: Step, other: Step) -> bool:
    longer = other.end_s - other.begin_s > step.end_s - step.begin_s
    return longer and other.begin_s <= step.begin_s and step.end_s <= other.end_s


def _nested(step: Step, y: int, scale: _Scale) -> str:
    x, width = scale.x(step.begin_s), max(scale.x(step.end_s) - scale.x(step.begin_s) - 1, 1.0)
    tip = escape(f"{step.name} {_duration(step.end_s - step.begin_s)}")
    return f"<g>{_rectangle(x, y + _BAR - 6, width, 6, _NESTED)}<title>{tip}</title></g>"


def _axis(scale: _Scale, y: int) -> list[str]:
    parts = []
    for tick in range(_TICKS + 1):
        time_s = scale.width_s * tick / _TICKS
        x = scale.x(scale.begin_s + time_s)
        parts.append(f'<line x1="{x:.1f}" y1="{_TOP - 14}" x2="{x:.1f}" y2="{y - 12}" stroke="#cfd8dc"/>')
        anchor = "end" if tick == _TICKS else "middle" if tick else "start"
        parts.append(f'<text x="{x:.1f}" y="{y + 4}" text-anchor="{anchor}">{_duration(time_s)}</text>')
    return parts


def _rectangle(x: float, y: float, width: float, height: float, colour: str) -> str:
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill="{colour}"/>'


def _colour(step: Step) -> str:
    if step.failed:
        return _FAILED
    return _UNDO if step.name.startswith("undo: ") else _COLOURS.get(step.name, _OTHER)


def _duration(seconds: float) -> str:
    if seconds < 0.001:
        return f"{seconds * 1e6:.0f} us"
    return f"{seconds * 1000:.2f} ms" if seconds < 1 else f"{seconds:.2f} s"
