"""Write a driver: here one whose devices are others', each call of theirs timed.

    python3 timed_driver.py timed:sim:blk

A driver in a package of its own registers by an entry point, and then every command of vdpabridge knows its devices
('vdpabridge serve timed:vdpa:blk0 --socket-path blk0.sock'):

    [project.entry-points."vdpabridge.drivers"]
    timed = "timed_driver:DRIVER"

`Device` checks whether an operation is legal, and then calls the hook of the same name (`vdpabridge.device.hooks`).
What every device must have is abstract there; what needs a capability is overridden only by who claims it.
"""

import sys
import time
from collections.abc import Callable, Sequence, Set
from typing import TypeVar

import vdpabridge
from vdpabridge.abi.vring_base import QueueBase
from vdpabridge.device import Capability, Device, Identity, MemoryRegion, Operation, QueueSetup
from vdpabridge.drivers.names import DeviceName
from vdpabridge.drivers.registry import Driver

Value = TypeVar("Value")


class Timed(Device):
    """``device`` (owned), with a line on standard error for each operation that a guest would wait for."""

    def __init__(self, device: Device) -> None:
        super().__init__(f"timed:{device.name}", device.limit)
        self._device = device

    # what it is

    @property
    def identity(self) -> Identity:
        return self._device.identity

    @property
    def capabilities(self) -> Set[Capability]:
        """Only what is handed on below: who claims more must have more hooks."""
        return self._device.capabilities & {Capability.SUSPEND, Capability.RESUME, Capability.ENABLE_WHILE_RUNNING}

    @property
    def offered_features(self) -> int:
        return self._device.offered_features

    def fileno(self) -> int:
        return self._device.fileno()

    # the hooks that every driver has

    def _accept_features(self, features: int) -> None:
        self._device.accept_features(features)

    def _read_config(self, offset: int, size: int) -> bytes:
        return self._device.read_config(offset, size)

    def _map(self, regions: Sequence[MemoryRegion]) -> None:
        self._timed("map", lambda: self._device.map(regions))

    def _unmap(self, regions: Sequence[MemoryRegion]) -> None:
        self._timed("unmap", lambda: self._device.unmap(regions))

    def _set_queue(self, index: int, setup: QueueSetup) -> None:
        self._device.set_queue(index, setup)

    def _set_base(self, index: int, base: QueueBase) -> None:
        self._device.set_base(index, base)

    def _get_base(self, index: int) -> QueueBase:
        return self._device.get_base(index)

    def _bind_eventfd(self, operation: Operation, index: int, eventfd: int | None) -> None:
        setters = {
            Operation.SET_KICK: self._device.set_kick,
            Operation.SET_CALL: self._device.set_call,
            Operation.SET_ERR: self._device.set_err,
        }
        setters[operation](index, eventfd)

    def _enable_queue(self, index: int, enabled: bool) -> None:
        self._device.enable_queue(index, enabled)

    def _check_health(self) -> None:
        self._device.check_health()

    def _start(self) -> None:
        self._timed("start", self._device.start)

    def _reset(self) -> None:
        self._timed("reset", self._device.reset)

    def _close(self) -> None:
        self._device.close()

    def _is_idle(self) -> bool:
        return self._device.is_idle()

    # those of the capabilities that it claims

    def _suspend(self, *, drain: bool) -> None:
        self._timed("suspend", lambda: self._device.suspend(drain=drain))

    def _resume(self) -> None:
        self._timed("resume", self._device.resume)

    def _timed(self, what: str, act: Callable[[], Value]) -> Value:
        begin_s = time.monotonic()
        try:
            return act()
        finally:
            print(f"{self.name}: {what}: {(time.monotonic() - begin_s) * 1e6:.0f} us", file=sys.stderr)


def _open(name: DeviceName, timeout_s: float | None) -> Device:
    return Timed(vdpabridge.open(name.text.removeprefix("timed:"), timeout_s=timeout_s))


#: How its devices are checked, opened, and what their virtio device id is, where that is known without opening one.
DRIVER = Driver(check=lambda _name: None, open=_open, device_id=lambda _name: None)


def main(text: str) -> None:
    with DRIVER.open(DeviceName.parse(text), 30.0) as device:
        device.accept_features(1 << vdpabridge.VIRTIO_F_VERSION_1)
        device.start()
        device.suspend()
        device.resume()
        print(f"{device.name} is {device.state.value}")


if __name__ == "__main__":
    main(*sys.argv[1:])
