"""What the process that owns a device has answered, for a person: a few aligned lines, with units."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

__all__ = ["READABLE", "bytes_text", "duration_text"]

Facts = Mapping[str, Any]
#: Steps after which a device works again.
_RESUMING = ("resume", "start")


def status(facts: Facts) -> Iterable[str]:
    """The device, and what it does."""
    yield f"{facts['device']}: {facts['state']}{_circumstances(facts)}"
    if (procedure := facts["procedure"]) is not None:
        yield _row("now", _under_way(procedure))
    for index, queue in facts["queues"].items():
        position = f", at {queue['position']}" if "position" in queue else ""
        enabled = "enabled" if queue["enabled"] else "disabled"
        yield _row(f"queue {index}", f"{queue['size']} descriptors, {enabled}{position}")
    for each in facts["moves"]:
        yield _row(f"move {each['move']}", each["fate"])
    yield _row("features", " ".join(facts["features"]) or "none accepted")
    yield _row("can", " ".join(facts["capabilities"]))
    if (last := facts["last_procedure"]) is not None:
        yield _row("last", f"{bytes_text(last['state_bytes'])} of device state{_blackout(last['steps'])}")


def statistics(facts: Facts) -> Iterable[str]:
    """What was done since the process began."""
    yield f"{facts['device']}: served for {duration_text(facts['uptime_s'])}"
    yield _row("front-ends", f"{facts['front_ends']}, with {facts['messages']} messages")
    for name, counts in facts["procedures"].items():
        moved, took = bytes_text(counts["state_bytes"]), duration_text(counts["seconds"])
        yield _row(name, f"{counts['done']} done, {counts['failed']} failed, {moved} of device state, {took}")


def state(facts: Facts) -> Iterable[str]:
    """What a device does after it was suspended or resumed."""
    held = ": another client holds it, as long as that is connected" if facts.get("held") else ""
    yield f"the device is {facts['state']}{held}"


def saved(facts: Facts) -> Iterable[str]:
    """How a save went."""
    yield f"saved {bytes_text(facts['state_bytes'])} of device state; the device is {facts['state']}"
    yield from _steps(facts["steps"])


def loaded(facts: Facts) -> Iterable[str]:
    """How a load went."""
    yield f"loaded {bytes_text(facts['state_bytes'])} of device state into {facts['device']}"
    yield from _steps(facts["steps"])


def moved(facts: Facts) -> Iterable[str]:
    """How a migration went."""
    yield f"moved {bytes_text(facts['state_bytes'])} of device state; running now: {facts['running']}"
    yield from _steps(facts["steps"])


#: Command -> its lines.
READABLE: Mapping[str, Callable[[Facts], Iterable[str]]] = {
    "status": status,
    "statistics": statistics,
    "suspend": state,
    "resume": state,
    "save": saved,
    "load": loaded,
    "migrate": moved,
}


def duration_text(seconds: float) -> str:
    """``seconds`` in the unit that suits them."""
    # what would be rounded to 1000 of a unit is 1 of the next
    if seconds < 0.0009995:
        return f"{seconds * 1e6:.0f} us"
    if seconds < 0.99995:
        return f"{seconds * 1000:.1f} ms"
    return f"{seconds:.1f} s" if seconds < 120 else f"{seconds // 60:.0f} min {seconds % 60:.0f} s"


def bytes_text(count: int) -> str:
    """``count`` bytes in the unit that suits them; powers of 1000."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"


def _circumstances(facts: Facts) -> str:
    found = [
        text
        for text, holds in (
            ("front-end connected", facts["front_end"]),
            ("no front-end", not facts["front_end"]),
            ("held suspended", facts["held"] and not facts["moved"] and not facts["arriving"]),
            ("its state was moved to another device", facts["moved"]),
            ("the state of another device, which may run, is on its way", facts["arriving"] and _loads(facts)),
            (
                "its state came from another device, which may run",
                facts["arriving"] and not facts["lost"] and not _loads(facts),
            ),
            ("its state arrived from another device", facts["arrived"]),
            ("it was to get the state of another device, and has lost it", facts["arriving"] and facts["lost"]),
            ("it has lost that state since", facts["moved"] and facts["lost"]),
        )
        if holds
    ]
    return f", {', '.join(found)}"


def _loads(facts: Facts) -> bool:
    procedure = facts["procedure"]
    return procedure is not None and procedure["method"] == "load"


def _under_way(procedure: Facts) -> str:
    text = f"{procedure['method']}: {bytes_text(procedure['state_bytes'])} in {duration_text(procedure['seconds'])}"
    stalled_s = procedure["seconds_since_progress"]
    return text if stalled_s < 1 else f"{text}, nothing for {duration_text(stalled_s)}"


def _steps(steps: Iterable[Facts]) -> Iterable[str]:
    for step in steps:
        failed = f"  {step['failed']}" if step["failed"] else ""
        yield _row(step["name"], f"{duration_text(step['end_s'] - step['begin_s']):>9}{failed}")
    if text := _blackout(list(steps)):
        yield _row("blackout", f"{text.removeprefix(', blackout '):>9}")


def _blackout(steps: list[Facts]) -> str:
    """How long no device worked, if the steps tell when one did again."""
    began = [step["begin_s"] for step in steps if step["name"] == "suspend"]
    ended = [step["end_s"] for step in steps if step["name"] in _RESUMING]
    return f", blackout {duration_text(max(ended) - min(began))}" if began and ended else ""


def _row(name: str, text: str) -> str:
    return f"  {name:<14}{text}".rstrip()
