"""``vdpabridge inspect``: images of simulated devices, and of others' making."""

import json

import pytest

from vdpabridge.cli import main
from vdpabridge.drivers.sim import Sim
from vdpabridge.linux.deadline import Deadline
from vdpabridge.state.image.description import identify
from vdpabridge.state.image.writer import ImageFacts, ImageWriter
from vdpabridge.state.procedures import save_file
from vdpabridge.state.snapshot import DeviceSnapshot
from vdpabridge.state.transfer.channel import Limits

from ..state.image.test_image import FACTS, GOLDEN, image_of


@pytest.fixture
def image(tmp_path):
    with Sim.blk(1 << 20, timeout_s=5) as device:
        device.accept_features(1 << 32 | 1 << 9)
        save_file(device, str(tmp_path / "blk"), Limits(Deadline(20)))
    return str(tmp_path / "blk")


def test_a_disk(image, capsys):
    assert main(["-j", "inspect", image]) == 0
    facts = json.loads(capsys.readouterr().out)["image"][image]
    assert facts["device"] == "block"
    assert facts["features"] == ["FLUSH", "VERSION_1"]
    assert facts["config"]["capacity"] == 2048
    assert facts["state"]["format"] == "vdpabridge's simulator, version 2"
    assert len(facts["digest"]) == 64


def test_a_table(capsys):
    assert main(["inspect", str(GOLDEN / "version-1")]) == 0
    lines = [line.split(None, 3) for line in capsys.readouterr().out.splitlines()]
    assert ["queues", "0", "avail_index", "77"] in lines
    assert ["queues", "2", "enabled", "False"] in lines


def test_packed_rings(capsys):
    assert main(["-j", "inspect", str(GOLDEN / "version-1-packed")]) == 0
    queue = json.loads(capsys.readouterr().out)["image"][str(GOLDEN / "version-1-packed")]["queues"]["1"]
    assert (queue["avail_index"], queue["used_index"], queue["avail_wrap"], queue["used_wrap"]) == (5, 6, 0, 1)


def test_a_network_device_and_a_file_system(tmp_path, capsys):
    images = {
        1: (b"\x02\0\0\0\0\x01" + bytes(6), {"mac": "020000000001"}),
        26: (b"share".ljust(36, b"\0") + b"\1\0\0\0", {"tag": "share", "num_request_queues": 1}),
        77: (b"\1\2", {"bytes": "0102"}),
    }
    for device_id, (config, expected) in images.items():
        facts = ImageFacts(DeviceSnapshot(device_id, 1 << 32, {}, config), None, 1, 256, False)
        path = tmp_path / str(device_id)
        path.write_bytes(image_of(facts, []))
        assert main(["-j", "inspect", str(path)]) == 0
        shown = json.loads(capsys.readouterr().out)["image"][str(path)]
        assert shown["config"] == expected
        assert "state" not in shown


def test_two_images_are_one_document(capsys):
    images = [str(GOLDEN / "version-1"), str(GOLDEN / "version-1-packed")]
    assert main(["-j", "inspect", *images]) == 0
    assert list(json.loads(capsys.readouterr().out)["image"]) == images
    assert main(["inspect", *images]) == 0
    assert [line for line in capsys.readouterr().out.splitlines() if line.endswith(":")] == [
        f"{each}:" for each in images
    ]


def test_differences(tmp_path, capsys):
    other = tmp_path / "other"
    other.write_bytes(image_of(FACTS, [b"first"]))
    assert main(["inspect", "--diff", str(GOLDEN / "version-1"), str(other)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["WHAT", "state.size_bytes", "digest"]
    assert main(["-j", "inspect", "--diff", str(other), str(other)]) == 0
    assert json.loads(capsys.readouterr().out) == {"diff": {}}
    assert main(["inspect", "--diff", str(other), str(tmp_path / "nothing")]) == 2, "as diff(1)"
    assert main(["inspect", "--diff", str(other)]) == 2
    assert "two images, not 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("first", "device_id", "expected"),
    [
        (b"vdpa-sim\1\0\0\0", 2, "vdpabridge's simulator, version 1"),
        (bytes.fromhex("b1bb1d1b0bb1d1b000000002"), 1, "passt, version 2"),
        (b"\1\0\2", 26, "virtiofsd, version 2"),
        (b"\0\0\2", 26, "virtiofsd, version 1"),
        (b"\1\0\2", 2, "not known"),
        (b"", 26, "empty"),
    ],
)
def test_whose_state_it_is(first, device_id, expected):
    assert identify(first, device_id) == expected


def test_what_is_no_image(tmp_path, capsys):
    path = tmp_path / "x"
    for content, why in (
        (b"", "ends in the middle"),
        (b"not an image at all", "does not begin"),
        (image_of()[:-1], "ends"),
    ):
        path.write_bytes(content)
        assert main(["inspect", str(path)]) == 1
        said = capsys.readouterr().err
        assert str(path) in said
        assert why in said
    assert main(["inspect", str(tmp_path / "nowhere")]) == 1
    assert "No such file" in capsys.readouterr().err


def test_state_of_any_size(tmp_path, capsys):
    path = tmp_path / "x"
    with path.open("wb") as file, ImageWriter(file.write, FACTS) as writer:
        for _ in range(5):
            writer.state(memoryview(bytes(1 << 20)))
        writer.end()
    assert main(["-j", "inspect", str(path)]) == 0
    assert json.loads(capsys.readouterr().out)["image"][str(path)]["state"]["size_bytes"] == 5 << 20
