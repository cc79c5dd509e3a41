"""What a person reads of a process that owns a device: aligned lines, with units."""

import pytest

from vdpabridge.cli.readable import READABLE, bytes_text, duration_text

STEPS = [
    {"name": "suspend", "begin_s": 10.0, "end_s": 10.0005, "failed": ""},
    {"name": "device state", "begin_s": 10.0005, "end_s": 10.1, "failed": ""},
    {"name": "resume", "begin_s": 10.2, "end_s": 10.25, "failed": ""},
]
STATUS = {
    "device": "sim:fs",
    "state": "running",
    "held": False,
    "moved": False,
    "arriving": False,
    "arrived": False,
    "lost": False,
    "moves": [],
    "front_end": True,
    "capabilities": ["RESUME", "SUSPEND"],
    "features": ["VERSION_1"],
    "queues": {"0": {"size": 64, "enabled": True}, "1": {"size": 128, "enabled": False, "position": 17}},
    "procedure": None,
    "last_procedure": None,
}


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (1000, "1.0 kB"), (1_234_567, "1.2 MB"), (5 * 10**9, "5.0 GB")],
)
def test_bytes(count, text):
    assert bytes_text(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 us"), (0.000_123, "123 us"), (0.0123, "12.3 ms"), (1.5, "1.5 s"), (119, "119.0 s"), (125, "2 min 5 s")],
)
def test_durations(seconds, text):
    assert duration_text(seconds) == text


def lines(command, facts):
    return list(READABLE[command](facts))


def test_status():
    assert lines("status", STATUS) == [
        "sim:fs: running, front-end connected",
        "  queue 0       64 descriptors, enabled",
        "  queue 1       128 descriptors, disabled, at 17",
        "  features      VERSION_1",
        "  can           RESUME SUSPEND",
    ]


@pytest.mark.parametrize(
    ("changes", "first"),
    [
        ({"front_end": False, "state": "reset"}, "sim:fs: reset, no front-end"),
        ({"held": True, "state": "suspended"}, "sim:fs: suspended, front-end connected, held suspended"),
        (
            {"held": True, "moved": True, "state": "suspended"},
            "sim:fs: suspended, front-end connected, its state was moved to another device",
        ),
        (
            {"held": True, "arriving": True, "state": "reset"},
            "sim:fs: reset, front-end connected, its state came from another device, which may run",
        ),
        (
            {"held": True, "arriving": True, "lost": True, "state": "reset"},
            "sim:fs: reset, front-end connected, it was to get the state of another device, and has lost it",
        ),
        ({"arrived": True}, "sim:fs: running, front-end connected, its state arrived from another device"),
        (
            {"held": True, "moved": True, "lost": True, "state": "reset"},
            "sim:fs: reset, front-end connected, its state was moved to another device, it has lost that state since",
        ),
    ],
)
def test_what_a_device_does(changes, first):
    assert lines("status", STATUS | changes)[0] == first


def test_a_procedure_under_way():
    under_way = {"method": "save", "seconds": 3.0, "state_bytes": 2_000_000, "seconds_since_progress": 0.1}
    assert lines("status", STATUS | {"procedure": under_way})[1] == "  now           save: 2.0 MB in 3.0 s"
    stalled = under_way | {"seconds_since_progress": 2.5}
    assert lines("status", STATUS | {"procedure": stalled})[1].endswith("save: 2.0 MB in 3.0 s, nothing for 2.5 s")


def test_the_last_procedure():
    last = {"state_bytes": 253, "steps": STEPS}
    said = lines("status", STATUS | {"last_procedure": last})
    assert said[-1] == "  last          253 bytes of device state, blackout 250.0 ms"
    # whoever loads does not know when its front-end starts it
    loaded = {"state_bytes": 253, "steps": STEPS[:2]}
    assert lines("status", STATUS | {"last_procedure": loaded})[-1] == "  last          253 bytes of device state"


def test_save():
    assert lines("save", {"state_bytes": 253, "state": "running", "steps": STEPS}) == [
        "saved 253 bytes of device state; the device is running",
        "  suspend          500 us",
        "  device state    99.5 ms",
        "  resume          50.0 ms",
        "  blackout       250.0 ms",
    ]


def test_a_step_that_failed_says_why():
    steps = [STEPS[0] | {"failed": "no answer"}]
    assert lines("load", {"state_bytes": 0, "device": "sim:fs", "steps": steps}) == [
        "loaded 0 bytes of device state into sim:fs",
        "  suspend          500 us  no answer",
    ]


def test_migrate_suspend_and_statistics():
    moved = {"state_bytes": 9, "running": "nothing, until a front-end starts the destination", "steps": []}
    assert lines("migrate", moved) == [
        "moved 9 bytes of device state; running now: nothing, until a front-end starts the destination"
    ]
    assert lines("suspend", {"state": "suspended"}) == ["the device is suspended"]
    counts = {"done": 1, "failed": 2, "state_bytes": 3000, "seconds": 0.25}
    facts = {
        "device": "sim:fs",
        "uptime_s": 130.0,
        "front_ends": 1,
        "messages": 20,
        "procedures": {"save": counts},
    }
    assert lines("statistics", facts) == [
        "sim:fs: served for 2 min 10 s",
        "  front-ends    1, with 20 messages",
        "  save          1 done, 2 failed, 3.0 kB of device state, 250.0 ms",
    ]
