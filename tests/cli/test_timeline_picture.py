"""The picture of a procedure: to scale, with every step in it."""

import re
import xml.etree.ElementTree as ET

import pytest

from vdpabridge.cli.timeline_picture import draw
from vdpabridge.state.report import Report, Step

LANES = {
    "source": [Step("suspend", 10.0, 10.1), Step("device state", 10.1, 10.5), Step("check", 10.5, 10.5004)],
    "destination": [Step("device state", 10.2, 10.6, "it <broke>"), Step("undo: reset", 10.6, 10.65)],
}


def bars(picture):
    """name -> (x, width), of the steps."""
    root = ET.fromstring(picture)
    space = "{http://www.w3.org/2000/svg}"
    return {
        group.find(f"{space}title").text: (float(box.get("x")), float(box.get("width")))
        for group in root.iter(f"{space}g")
        for box in [group.find(f"{space}rect")]
    }


def test_to_scale():
    found = bars(draw("a & b", LANES))
    assert set(found) == {
        "suspend 100.00 ms",
        "device state 400.00 ms",
        "check 400 us",
        "device state 400.00 ms: it <broke>",
        "undo: reset 50.00 ms",
    }
    suspend, state = found["suspend 100.00 ms"], found["device state 400.00 ms"]
    assert state[1] == pytest.approx(4 * suspend[1], abs=0.2)
    assert state[0] == pytest.approx(suspend[0] + suspend[1], abs=0.2)
    assert found["check 400 us"][1] >= 1, "short, and still to be seen"


def test_the_blackout():
    assert "blackout 650.00 ms" in draw("x", LANES)
    assert re.search(r"blackout 1\.00 s", draw("x", {"only": [Step("suspend", 0, 0.5), Step("start", 0.5, 1.0)]}))


def test_the_blackout_ends_when_a_device_goes_on():
    steps = [Step("prepare", 0, 1), Step("suspend", 1, 2), Step("start", 2, 3), Step("reset the source", 3, 9)]
    assert "blackout 2.00 s" in draw("x", {"only": steps})


def test_parts_are_drawn_within():
    """They end before the whole does, and are noted before it."""
    lane = [Step("queue 0", 1.0, 1.2), Step("queue 1", 1.2, 1.9), Step("suspend", 1.0, 2.0), Step("start", 2.0, 2.1)]
    picture = draw("x", {"only": lane})
    found = bars(picture)
    suspend, first, second = (found[name] for name in ("suspend 1.00 s", "queue 0 200.00 ms", "queue 1 700.00 ms"))
    assert suspend[0] <= first[0] < second[0] < suspend[0] + suspend[1]
    assert picture.index("suspend") < picture.index("queue 0"), "so that it is not hidden"


def test_nothing_was_done():
    with pytest.raises(ValueError, match="nothing"):
        draw("x", {"source": []})


def test_a_report_notes_steps_that_fail():
    report = Report()
    with report.step("good"):
        pass
    with pytest.raises(OSError, match="bad"), report.step("worse"):
        raise OSError("bad")
    assert [(step.name, step.failed) for step in report.steps] == [("good", ""), ("worse", "bad")]
    assert report.seconds("good") >= 0
