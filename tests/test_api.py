"""What `import vdpabridge` gives: exactly what it says, lazily, with types."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import vdpabridge
from vdpabridge.drivers.sim import Sim
from vdpabridge.guest.memory import GuestMemory
from vdpabridge.guest.virtqueue import SplitQueue

ROOT = Path(__file__).resolve().parent.parent

#: The whole of it, so that nothing comes or goes unnoticed.
NAMES = [
    "Advice",
    "Bus",
    "BusDevice",
    "BusError",
    "BusEvent",
    "BusEvents",
    "Capability",
    "ConnectionLost",
    "ControlClient",
    "ControlError",
    "DeadlineExceeded",
    "Device",
    "DeviceBusy",
    "DeviceFailed",
    "DeviceHeld",
    "DeviceSnapshot",
    "DirtyLog",
    "FeatureError",
    "Identity",
    "ImageError",
    "InflightRegion",
    "KernelError",
    "Loss",
    "MemoryRegion",
    "MissingCapability",
    "NoSuchDevice",
    "OwnershipError",
    "PackedBase",
    "PeerRefused",
    "ProcedureFailed",
    "ProtocolError",
    "QueueEventfds",
    "QueueSetup",
    "QueueSnapshot",
    "ReplayFailed",
    "Report",
    "RunState",
    "Server",
    "SnapshotError",
    "SplitBase",
    "StateDirection",
    "StateError",
    "StatePhase",
    "StateWouldBeLost",
    "Step",
    "UsageError",
    "VIRTIO_F_RING_PACKED",
    "VIRTIO_F_VERSION_1",
    "VIRTIO_ID_BLOCK",
    "VIRTIO_ID_FS",
    "VIRTIO_ID_NET",
    "VdpaBridgeError",
    "__version__",
    "capture",
    "inspect",
    "listen",
    "load",
    "load_state",
    "migrate",
    "open",
    "restore",
    "resume",
    "save",
]

CLIENT = """
import vdpabridge
from vdpabridge.guest.memory import GuestMemory


def move(first: str, second: str, path: str) -> float:
    with GuestMemory(4096) as memory, vdpabridge.open(first) as source, vdpabridge.open(second) as destination:
        destination.map([memory.region])
        try:
            report: vdpabridge.Report = vdpabridge.migrate(source, destination, accept=[vdpabridge.Loss.CONTROL_QUEUE])
        except vdpabridge.ProcedureFailed as error:
            advice: vdpabridge.Advice = error.advice
            raise SystemExit(advice.value) from error
        vdpabridge.save(destination, path)
        state: vdpabridge.RunState = destination.state
        if state is vdpabridge.RunState.SUSPENDED:
            vdpabridge.resume(destination)
        names: dict[str, object] = vdpabridge.inspect(path)
        print(names, 1 << vdpabridge.VIRTIO_F_VERSION_1)
        return report.seconds("suspend")
"""


def test_the_names():
    assert sorted(vdpabridge.__all__) == sorted(NAMES)
    for name in NAMES:
        assert getattr(vdpabridge, name) is not None
    assert set(NAMES) <= set(dir(vdpabridge))
    with pytest.raises(AttributeError, match="module 'vdpabridge' has no attribute 'nothing'"):
        _ = vdpabridge.nothing


def test_type_checkers_see_the_same():
    tree = ast.parse((ROOT / "vdpabridge" / "__init__.pyi").read_text())
    seen = {
        (alias.name, node.module): alias.asname
        for node in tree.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert all(name == again for (name, _), again in seen.items())
    homes = {name: module for module, names in vdpabridge._PUBLIC.items() for name in names}
    assert dict(list(seen)) == homes


def test_importing_it_imports_none_of_it():
    program = "import sys, vdpabridge; print([name for name in sys.modules if name.startswith('vdpabridge.')])"
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert said.stdout == "[]\n"


def test_a_client_passes_a_strict_type_checker(tmp_path):
    assert (ROOT / "vdpabridge" / "py.typed").exists()
    (tmp_path / "client.py").write_text(CLIENT)
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "mypy",
            "--strict",
            "--follow-imports=silent",
            f"--cache-dir={tmp_path}/cache",
            "client.py",
        ],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "MYPYPATH": str(ROOT)},
    )
    assert done.stdout == "Success: no issues found in 1 source file\n"


def test_examples_pass_a_strict_type_checker(tmp_path):
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "mypy",
            "--strict",
            "--follow-imports=silent",
            f"--cache-dir={tmp_path}/cache",
            *(ROOT / "examples").glob("*.py"),
        ],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "MYPYPATH": str(ROOT)},
    )
    assert done.stdout.startswith("Success: "), done.stdout


# --- the everyday calls ---


class Guest:
    def __init__(self, memory, queue):
        self.memory = memory
        self.queue = queue

    def set_up(self, device):
        device.accept_features(1 << vdpabridge.VIRTIO_F_VERSION_1)
        device.map([self.memory.region])
        self.queue.attach(device, 0)
        device.start()

    @property
    def eventfds(self):
        return {0: vdpabridge.QueueEventfds(self.queue.kick_fd, self.queue.call_fd)}


@pytest.fixture
def guest():
    with GuestMemory(1 << 20) as memory, SplitQueue(memory, 16) as queue:
        yield Guest(memory, queue)


@pytest.mark.parametrize("by", ["path", "Path", "descriptor"])
def test_save_inspect_and_load(guest, tmp_path, by):
    path = tmp_path / "image"
    with vdpabridge.open("sim:blk,size=1M") as device:
        assert isinstance(device, Sim)
        assert device.timeout_s == 30
        guest.set_up(device)
        if by == "descriptor":
            with open(path, "wb") as file:
                report = vdpabridge.save(device, file.fileno())
        else:
            report = vdpabridge.save(device, str(path) if by == "path" else path)
        assert device.state is vdpabridge.RunState.RUNNING
    if by == "descriptor":
        with open(path, "rb") as file:
            assert vdpabridge.inspect(file.fileno())["digest"] == report.digest.hex()
    assert vdpabridge.inspect(path)["device"] == "block"
    with vdpabridge.open("sim:blk,size=1M") as device:
        device.map([guest.memory.region])
        loaded = vdpabridge.load(device, path, eventfds=guest.eventfds)
        assert loaded.digest == report.digest
        assert device.state is vdpabridge.RunState.RUNNING
        assert device.queues[0].eventfds
    with vdpabridge.open("sim:blk,size=1M") as device:
        vdpabridge.load_state(device, path)
        assert device.state is vdpabridge.RunState.RESET


def test_stay_suspended(guest, tmp_path):
    with vdpabridge.open("sim:blk") as device:
        guest.set_up(device)
        vdpabridge.save(device, tmp_path / "image", stay_suspended=True)
        assert device.state is vdpabridge.RunState.SUSPENDED


def test_migrate(guest):
    with vdpabridge.open("sim:blk") as source, vdpabridge.open("sim:blk") as destination:
        guest.set_up(source)
        destination.map([guest.memory.region])
        gone = []
        report = vdpabridge.migrate(source, destination, progress=gone.append)
        assert (source.state, destination.state) == (vdpabridge.RunState.RESET, vdpabridge.RunState.RUNNING)
        assert gone[-1] == report.state_bytes


def test_limits_reach_the_transfer(guest, tmp_path):
    with vdpabridge.open("sim:blk") as device:
        guest.set_up(device)
        with pytest.raises(vdpabridge.ProcedureFailed, match="more than 1 bytes came"):
            vdpabridge.save(device, tmp_path / "image", size_limit_bytes=1)
        with pytest.raises(vdpabridge.ProcedureFailed, match=r"not done within 0 s|no time is left"):
            vdpabridge.save(device, tmp_path / "image", timeout_s=0)
        assert device.state is vdpabridge.RunState.RUNNING
    assert list(tmp_path.iterdir()) == []


def test_an_image_that_is_not_there(tmp_path):
    with pytest.raises(vdpabridge.VdpaBridgeError, match="No such file or directory"):
        vdpabridge.inspect(tmp_path / "missing")
