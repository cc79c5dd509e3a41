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
        "suspend 100.0 ms",
        "device state 400.0 ms",
        "check 400 us",
        "device state 400.0 ms: it <broke>",
        "undo: reset 50.0 ms",
    }
    suspend, state = found["suspend 100.0 ms"], found["device state 400.0 ms"]
    assert state[1] == pytest.approx(4 * suspend[1], abs=0.2)
    assert state[0] == pytest.approx(suspend[0] + suspend[1], abs=0.2)
    assert found["check 400 us"][1] >= 1, "short, and still to be seen"


def test_the_blackout():
    assert "blackout at least 650.0 ms" in draw("x", LANES), "nobody has said that a device works again"
    steps = [Step("suspend", 0, 0.5), Step("start", 0.5, 1.0)]
    assert "blackout 1.0 s" in draw("x", {"only": steps})
    failed = [steps[0], Step("start", 0.5, 1.0, "no answer")]
    assert "blackout at least 1.0 s" in draw("x", {"only": failed})
    assert "blackout 1" not in draw("x", {"only": [Step("load", 0, 1.0)]}), "no device was stopped"


def test_the_blackout_ends_when_a_device_goes_on():
    steps = [Step("prepare", 0, 1), Step("suspend", 1, 2), Step("start", 2, 3), Step("reset the source", 3, 9)]
    assert "blackout 2.0 s" in draw("x", {"only": steps})


def test_parts_are_drawn_within():
    """They end before the whole does, and are noted before it."""
    lane = [Step("queue 0", 1.0, 1.2), Step("queue 1", 1.2, 1.9), Step("suspend", 1.0, 2.0), Step("start", 2.0, 2.1)]
    picture = draw("x", {"only": lane})
    found = bars(picture)
    suspend, first, second = (found[name] for name in ("suspend 1.0 s", "queue 0 200.0 ms", "queue 1 700.0 ms"))
    assert suspend[0] <= first[0] < second[0] < suspend[0] + suspend[1]
    assert picture.index("suspend") < picture.index("queue 0"), "so that it is not hidden"


def texts(picture):
    root = ET.fromstring(picture)
    return [text.text for text in root.iter("{http://www.w3.org/2000/svg}text")]


def test_every_bar_has_its_name_and_none_lies_on_another():
    lane = [Step(f"step {number}", 10 + number / 1000, 10 + (number + 1) / 1000) for number in range(12)]
    lane.append(Step("suspend", 10.012, 12.0))
    picture = draw("x", {"only": lane})
    assert {f"step {number} 1.0 ms" for number in range(12)} <= set(texts(picture))
    places = re.findall(r'<text x="([0-9.]+)" y="(\d+)">step (\d+) 1.0 ms<', picture)
    assert len({(y, round(float(x) / 80)) for x, y, _ in places}) == 12


def test_it_says_when_where_and_in_which_colours():
    picture = draw("a to b", LANES)
    root = ET.fromstring(picture)
    assert root.get("viewBox") == f"0 0 {root.get('width')} {root.get('height')}"
    found = texts(picture)
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d [+-]\d{4} on \S+", found[1])
    assert {"suspend", "device state", "check", "start, resume", "undo", "failed", "blackout"} <= set(found)


@pytest.mark.parametrize(
    ("end_s", "ticks"),
    [
        (0.65, ["0 us", "200.0 ms", "400.0 ms", "600.0 ms"]),
        (6.1, ["0 us", "2.0 s", "4.0 s", "6.0 s"]),
        (1.0, ["0 us", "200.0 ms"]),
    ],
)
def test_ticks_are_round(end_s, ticks):
    found = texts(draw("x", {"only": [Step("load", 0, end_s)]}))
    assert set(ticks) <= set(found)


def test_odd_steps_are_drawn_too():
    odd = [Step("bell \x07", 0, 1, "why \x00 <not>"), Step("late", 1e15, 1e15 + 1)]
    assert "bell ? 1.0 s: why ? &lt;not&gt;" in draw("t\x1b", {"n\x02": odd})
    ET.fromstring(draw("x", {"only": odd}))


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
