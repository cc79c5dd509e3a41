"""Save, load and migrate, over any driver: all or nothing, and never both running or neither.

Each checks what can be checked before it touches anything, and puts back what it has done where a step fails.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from contextlib import suppress

from ..abi.state_image import PART_VALUE_BYTES_MAX
from ..device import Capability, Device, RunState, StateDirection, StatePhase
from ..errors import MissingCapability, StateError, VdpaBridgeError
from ..memory import memory_file
from ..transitions import ALTERNATIVES
from .channel import Limits, copy, enlarge, read_some, write_all
from .files import replacing
from .fit import check_fits, facts_of
from .image import ImageFacts, ImageReader, ImageWriter
from .replay import resume
from .report import Report
from .snapshot import QueueEventfds, capture, eventfds_of, restore
from .stream import reading

__all__ = ["ProcedureFailed", "load", "load_state", "migrate", "save", "save_file", "verify"]

#: What is spooled in memory; more goes to a file without a name.
_SPOOL_BYTES = 16 << 20


class ProcedureFailed(VdpaBridgeError):
    """A procedure that did not come to its end. ``report`` has its steps; ``running`` what goes on now, if anything."""

    def __init__(self, what: str, device: Device, cause: BaseException, report: Report, running: str) -> None:
        why = str(cause) or type(cause).__name__
        super().__init__(what, device=device.name, why=why, hint=f"running now: {running}")
        self.report = report
        self.running = running


def save(device: Device, sink: int, limits: Limits, *, go_on: bool = True) -> Report:
    """Write the image of ``device`` to ``sink`` (borrowed).

    A running device is suspended for it, and goes on afterwards (with ``go_on``), and where saving fails in any case.
    Raises `StateError` or `MissingCapability` before anything was done, `ProcedureFailed` after that.
    """
    was_running = _require_saveable(device, "save")
    report = Report()
    try:
        _suspend(device, report)
        writer = ImageWriter(lambda data: write_all(sink, data, limits), facts_of(device, capture(device)))
        if Capability.DEVICE_STATE in device.capabilities:
            with report.step("device state"):
                _read_state(device, writer, limits, report)
            with report.step("check"):
                device.check_state()
        report.digest = writer.end()
    except BaseException as error:
        _undo_save(device, report, was_running=was_running)
        if isinstance(error, (VdpaBridgeError, OSError)):
            running = device.name if device.state is RunState.RUNNING else "nothing"
            raise ProcedureFailed("save", device, error, report, running) from error
        raise
    if was_running and go_on:
        with report.step("resume"):
            resume(device)
    return report


def save_file(device: Device, path: str, limits: Limits, *, go_on: bool = True) -> Report:
    """Save to file ``path``, which is there whole or, where this raises, as it was before. Raises as `save` does."""
    _require_saveable(device, "save")
    with replacing(path) as fd:
        return save(device, fd, limits, go_on=go_on)


def verify(source: int, limits: Limits, device: Device | None = None) -> ImageFacts:
    """Read the image in ``source`` (borrowed) to its end; with ``device``, see whether it would take it.

    Raises `ImageError` for one that is damaged, `SnapshotError` or `FeatureError` for one that does not fit.
    """
    reader = ImageReader(reading(source, limits))
    for _ in reader.state():
        continue
    if device is not None:
        check_fits(reader.facts, device)
    return reader.facts


def load(
    device: Device, source: int, limits: Limits, eventfds: Mapping[int, QueueEventfds], *, start: bool = True
) -> Report:
    """Bring reset ``device`` to where the image in ``source`` (borrowed) was taken, and (``start``) let it go on.

    The image is read and verified to its end before the device sees anything of it. The guest's memory is the
    caller's to map, the eventfds are those of this process. Raises `ImageError`, `SnapshotError`, `FeatureError`,
    `StateError` before the device was touched; `ProcedureFailed` after that, and the device is reset.
    """
    if device.state is not RunState.RESET:
        raise StateError(device.name, "load", device.state.value, (RunState.RESET.value,))
    report = Report()
    reader, spool = _read_image(device, source, limits, report)
    try:
        _give_state(device, reader, spool, limits, report)
        with report.step("restore"):
            restore(device, reader.facts.snapshot, eventfds)
        if start:
            with report.step("start"):
                device.start()
    except BaseException as error:
        raise _failed_load(device, error, report) from error
    finally:
        os.close(spool)
    return report


def load_state(device: Device, source: int, limits: Limits) -> Report:
    """Give reset ``device`` its own state out of the image in ``source`` (borrowed), and nothing else of it.

    For a device whose features and queues somebody else sets up, as a front-end does. Raises as `load` does.
    """
    report = Report()
    reader, spool = _read_image(device, source, limits, report)
    try:
        _give_state(device, reader, spool, limits, report)
    except BaseException as error:
        raise _failed_load(device, error, report) from error
    finally:
        os.close(spool)
    return report


def migrate(source: Device, destination: Device, limits: Limits) -> Report:
    """Have ``destination``, which is reset and has the guest's memory mapped, go on with the work of ``source``.

    The source's eventfds become the destination's. Where a step fails the destination is reset and the source goes on.
    Raises `StateError`, `MissingCapability`, `SnapshotError` or `FeatureError` before anything was done.
    """
    was_running = _require_saveable(source, "migrate")
    check_fits(facts_of(source, None), destination)
    report = Report()
    try:
        _suspend(source, report)
        snapshot = capture(source)
        if Capability.DEVICE_STATE in source.capabilities:
            with report.step("device state"):
                report.state_bytes = _carry_state(source, destination, limits)
            with report.step("check"):
                source.check_state()
                destination.check_state()
        with report.step("restore"):
            restore(destination, snapshot, eventfds_of(source))
        with report.step("start"):
            destination.start()
    except BaseException as error:
        _reset(destination, report)
        _undo_save(source, report, was_running=was_running)
        if isinstance(error, (VdpaBridgeError, OSError)):
            running = source.name if source.state is RunState.RUNNING else "nothing"
            raise ProcedureFailed("migrate", source, error, report, running) from error
        raise
    with report.step("reset the source"), suppress(VdpaBridgeError):
        # the destination runs: whatever becomes of the source, it must not
        source.reset()
    return report


# --- steps ---


def _require_saveable(device: Device, what: str) -> bool:
    """Whether ``device`` runs; raises where it is in no state to be saved."""
    if device.state not in (RunState.CONFIGURED, RunState.RUNNING, RunState.SUSPENDED):
        legal = (RunState.CONFIGURED.value, RunState.RUNNING.value, RunState.SUSPENDED.value)
        raise StateError(device.name, what, device.state.value, legal)
    running = device.state is RunState.RUNNING
    if running and Capability.SUSPEND not in device.capabilities:
        alternative = ALTERNATIVES[Capability.SUSPEND]
        raise MissingCapability(device.name, what, Capability.SUSPEND.value, alternative)
    return running


def _suspend(device: Device, report: Report) -> None:
    if device.state is RunState.RUNNING:
        with report.step("suspend"):
            device.suspend()


def _read_state(device: Device, writer: ImageWriter, limits: Limits, report: Report) -> None:
    """Device state into the image, piece by piece: hashing takes the bytes through this process, once."""
    fd = _save_fd(device)
    try:
        enlarge(fd)
        buffer = memoryview(bytearray(PART_VALUE_BYTES_MAX))
        filled = 0
        while count := read_some(fd, buffer[filled:], limits):
            report.state_bytes += count
            limits.check(report.state_bytes)
            filled += count
            # full parts, so that equal state makes equal images however it came
            if filled == len(buffer):
                writer.state(buffer)
                filled = 0
        writer.state(buffer[:filled])
    finally:
        os.close(fd)


def _save_fd(device: Device) -> int:
    """The end to read ``device``'s state from, owned by the caller."""
    reader, writer = os.pipe2(os.O_CLOEXEC)
    try:
        instead = device.set_state_fd(StateDirection.SAVE, StatePhase.STOPPED, writer)
    except BaseException:
        os.close(reader)
        raise
    return _other(reader, instead)


def _load_fd(device: Device) -> int:
    """The end to write ``device``'s state to, owned by the caller."""
    reader, writer = os.pipe2(os.O_CLOEXEC)
    try:
        instead = device.set_state_fd(StateDirection.LOAD, StatePhase.STOPPED, reader)
    except BaseException:
        os.close(writer)
        raise
    return _other(writer, instead)


def _other(ours: int, instead: int | None) -> int:
    """The device's own descriptor in the place of our end, where it gave one."""
    if instead is not None:
        os.close(ours)
        return instead
    return ours


def _write_state(device: Device, spool: int, limits: Limits) -> None:
    fd = _load_fd(device)
    try:
        enlarge(fd)
        os.lseek(spool, 0, os.SEEK_SET)
        copy(spool, fd, limits)
    finally:
        os.close(fd)


def _carry_state(source: Device, destination: Device, limits: Limits) -> int:
    """Device state from one to the other, through the kernel alone; returns how many bytes that were."""
    reader = _save_fd(source)
    try:
        writer = _load_fd(destination)
        try:
            enlarge(reader)
            enlarge(writer)
            return copy(reader, writer, limits)
        finally:
            os.close(writer)
    finally:
        os.close(reader)


def _read_image(device: Device, source: int, limits: Limits, report: Report) -> tuple[ImageReader, int]:
    """The image, verified to its end and found to fit, and the device's state in a file that the caller owns."""
    with report.step("read the image"):
        reader = ImageReader(reading(source, limits))
        check_fits(reader.facts, device)
        spool = _spool(reader, limits, report)
    report.digest = reader.digest
    return reader, spool


def _give_state(device: Device, reader: ImageReader, spool: int, limits: Limits, report: Report) -> None:
    if reader.facts.has_state:
        with report.step("device state"):
            _write_state(device, spool, limits)
        with report.step("check"):
            device.check_state()


def _failed_load(device: Device, error: BaseException, report: Report) -> BaseException:
    """Reset ``device``; the error to raise."""
    _reset(device, report)
    if isinstance(error, (VdpaBridgeError, OSError)):
        return ProcedureFailed("load", device, error, report, "nothing")
    return error


def _spool(reader: ImageReader, limits: Limits, report: Report) -> int:
    """The device's state, verified, in a file of its own, owned by the caller."""
    spool = memory_file("vdpabridge-spool", 0)
    in_memory = True
    try:
        for piece in reader.state():
            report.state_bytes += len(piece)
            limits.check(report.state_bytes)
            if in_memory and report.state_bytes > _SPOOL_BYTES:
                spool, in_memory = _to_disk(spool, limits), False
            write_all(spool, piece, limits)
    except BaseException:
        os.close(spool)
        raise
    return spool


def _to_disk(spool: int, limits: Limits) -> int:
    """What is in ``spool`` (taken), in a file without a name."""
    try:
        with tempfile.TemporaryFile(buffering=0) as file:
            os.lseek(spool, 0, os.SEEK_SET)
            copy(spool, file.fileno(), limits)
            return os.dup(file.fileno())
    finally:
        os.close(spool)


def _undo_save(device: Device, report: Report, *, was_running: bool) -> None:
    with suppress(VdpaBridgeError), report.step("undo: abandon the transfer"):
        if Capability.DEVICE_STATE in device.capabilities and device.state is not RunState.RUNNING:
            device.abandon_state()
    if was_running and device.state is RunState.SUSPENDED:
        with suppress(VdpaBridgeError), report.step("undo: resume"):
            resume(device)


def _reset(device: Device, report: Report) -> None:
    with suppress(VdpaBridgeError), report.step("undo: reset"):
        device.reset()
