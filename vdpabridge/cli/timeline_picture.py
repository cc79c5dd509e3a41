"""A procedure to scale, as a picture: who did what and when, and how long no device worked."""

from __future__ import annotations

import math
import socket
import time
from collections.abc import Mapping, Sequence
from xml.sax.saxutils import escape

from ..state.report import Step
from .readable import duration_text

__all__ = ["draw"]

_WIDTH, _LEFT, _RIGHT, _TOP, _BAR, _ROW = 960, 110, 20, 84, 22, 18
_GAP, _LEGEND = 14, 34
_FONT = 'font-family="sans-serif" font-size="12"'
_CHARACTER = 7.0
#: Step -> colour, and what the legend says of it.
_COLOURS = {
    "suspend": "#c0392b",
    "device state": "#2980b9",
    "check": "#16a085",
    "place": "#b8860b",
    "start": "#27ae60",
    "resume": "#27ae60",
}
_OTHER, _UNDO, _FAILED, _NESTED, _DARK = "#7f8c8d", "#e67e22", "#8e44ad", "#2c3e50", "#eceff1"
_LEGEND_ENTRIES = (
    ("suspend", "#c0392b"),
    ("device state", "#2980b9"),
    ("check", "#16a085"),
    ("place", "#b8860b"),
    ("start, resume", "#27ae60"),
    ("other", _OTHER),
    ("undo", _UNDO),
    ("failed", _FAILED),
    ("blackout", _DARK),
)
#: Steps after which a device works.
_RESUMING = ("start", "resume", "undo: resume")
_TICKS = 6


def draw(title: str, lanes: Mapping[str, Sequence[Step]]) -> str:
    """An SVG picture of ``lanes``: a name and its steps, whose times are of one clock.

    The blackout is shaded: from the first ``suspend`` to the end of the last step after which a device works. If there
    is none, or one has failed, its length is a lower bound, and the picture says so. Every bar has a name. Steps within
    others are drawn as thinner bars. Raises ValueError if there are no steps.
    """
    steps = [step for lane in lanes.values() for step in lane]
    if not steps:
        raise ValueError("nothing was done: there is nothing to draw")
    begin_s, end_s = min(step.begin_s for step in steps), max(step.end_s for step in steps)
    scale = _Scale(begin_s, end_s)
    parts: list[str] = []
    y = _TOP
    for name, lane in lanes.items():
        drawn, height = _lane(lane, y, scale)
        parts += [f'<text x="8" y="{y + 16}">{_text(name)}</text>', *drawn]
        y += height + _GAP
    height = y + 24 + _LEGEND
    return (
        "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" '
                f'height="{height}" {_FONT}>',
                '<rect width="100%" height="100%" fill="white"/>',
                f'<text x="8" y="20" font-size="15">{_text(title)}</text>',
                f'<text x="8" y="38" fill="#546e7a">{_text(_when_and_where())}</text>',
                *_blackout(steps, scale, y),
                *_axis(scale, y),
                *parts,
                *_legend(height - _LEGEND + 12),
                "</svg>",
            ]
        )
        + "\n"
    )


class _Scale:
    """Seconds to pixels, with round ticks."""

    def __init__(self, begin_s: float, end_s: float) -> None:
        self.begin_s = begin_s
        self.end_s = end_s
        self._width_s = max(end_s - begin_s, 1e-9)
        least_s = self._width_s / _TICKS
        power = 10 ** math.floor(math.log10(least_s))
        self.tick_s = next(each * power for each in (1, 2, 5, 10) if each * power >= least_s)

    def x(self, time_s: float) -> float:
        return _LEFT + (time_s - self.begin_s) / self._width_s * (_WIDTH - _LEFT - _RIGHT)


def _when_and_where() -> str:
    return f"{time.strftime('%Y-%m-%d %H:%M:%S %z')} on {socket.gethostname()}"


def _blackout(steps: Sequence[Step], scale: _Scale, bottom: int) -> list[str]:
    suspends = [step.begin_s for step in steps if step.name == "suspend"]
    if not suspends:
        return []
    dark_s = min(suspends)
    ends = [step.end_s for step in steps if step.name in _RESUMING and not step.failed]
    light_s = max(ends, default=scale.end_s)
    known = bool(ends) and not any(step.failed for step in steps if step.name in _RESUMING)
    # what no step has ended lasts on: nobody here knows when a front-end starts the device
    text = f"blackout {'' if known else 'at least '}{duration_text(light_s - dark_s)}"
    x, width = scale.x(dark_s), scale.x(light_s) - scale.x(dark_s)
    place = min(x + 4, _WIDTH - _CHARACTER * len(text))
    return [
        _rectangle(x, _TOP - 14, width, bottom - _TOP + 8, _DARK),
        f'<text x="{place:.1f}" y="{_TOP - 20}">{text}</text>',
    ]


def _lane(lane: Sequence[Step], y: int, scale: _Scale) -> tuple[list[str], int]:
    """The bars of a lane, each with its name: in the bar, or on a line of its own below. Returns their height too."""
    parts: list[str] = []
    lines: list[float] = []
    # a step that has others within it ends after them, and must not hide them
    for step in sorted(lane, key=lambda step: (step.begin_s, -step.end_s)):
        if any(_is_within(step, other) for other in lane):
            parts.append(_nested(step, y, scale))
            continue
        x, width = scale.x(step.begin_s), max(scale.x(step.end_s) - scale.x(step.begin_s), 1.0)
        label = f"{step.name} {duration_text(step.end_s - step.begin_s)}"
        tip = _text(label + (f": {step.failed}" if step.failed else ""))
        parts.append(f"<g>{_rectangle(x, y, width, _BAR, _colour(step))}<title>{tip}</title></g>")
        room = _CHARACTER * len(label)
        if room + 8 < width:
            parts.append(f'<text x="{x + 4:.1f}" y="{y + 15}" fill="white">{_text(label)}</text>')
            continue
        begin = min(x, _WIDTH - room)
        line = next((number for number, free in enumerate(lines) if free <= begin), len(lines))
        if line == len(lines):
            lines.append(0.0)
        lines[line] = begin + room + 6
        below = y + _BAR + _ROW * (line + 1) - 4
        parts.append(f'<line x1="{x:.1f}" y1="{y + _BAR}" x2="{x:.1f}" y2="{below - 10}" stroke="{_colour(step)}"/>')
        parts.append(f'<text x="{begin:.1f}" y="{below}">{_text(label)}</text>')
    return parts, _BAR + _ROW * len(lines)


def _is_within(step: Step, other: Step) -> bool:
    longer = other.end_s - other.begin_s > step.end_s - step.begin_s
    return longer and other.begin_s <= step.begin_s and step.end_s <= other.end_s


def _nested(step: Step, y: int, scale: _Scale) -> str:
    x, width = scale.x(step.begin_s), max(scale.x(step.end_s) - scale.x(step.begin_s) - 1, 1.0)
    tip = _text(f"{step.name} {duration_text(step.end_s - step.begin_s)}")
    return f"<g>{_rectangle(x, y + _BAR - 6, width, 6, _NESTED)}<title>{tip}</title></g>"


def _axis(scale: _Scale, y: int) -> list[str]:
    parts = []
    for number in range(_TICKS + 1):
        time_s = number * scale.tick_s
        if scale.begin_s + time_s > scale.end_s:
            break
        x = scale.x(scale.begin_s + time_s)
        parts.append(f'<line x1="{x:.1f}" y1="{_TOP - 14}" x2="{x:.1f}" y2="{y - 4}" stroke="#cfd8dc"/>')
        anchor = "middle" if time_s and x < _WIDTH - 40 else "end" if time_s else "start"
        parts.append(f'<text x="{x:.1f}" y="{y + 10}" text-anchor="{anchor}">{duration_text(time_s)}</text>')
    return parts


def _legend(y: int) -> list[str]:
    parts, x = [], float(_LEFT)
    for name, colour in _LEGEND_ENTRIES:
        parts.append(_rectangle(x, y, 10, 10, colour))
        parts.append(f'<text x="{x + 14:.1f}" y="{y + 9}">{name}</text>')
        x += 14 + _CHARACTER * len(name) + 16
    return parts


def _text(text: str) -> str:
    """``text`` as XML can have it, which knows no control characters."""
    return escape("".join(character if character.isprintable() else "?" for character in text))


def _rectangle(x: float, y: float, width: float, height: float, colour: str) -> str:
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill="{colour}"/>'


def _colour(step: Step) -> str:
    if step.failed:
        return _FAILED
    return _UNDO if step.name.startswith("undo: ") else _COLOURS.get(step.name, _OTHER)
