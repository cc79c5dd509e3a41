"""Save, load and migrate, over any driver: all or nothing, and never both running or neither.

Each checks what can be checked before it touches anything, and puts back what it has done where a step fails. Where a
device does not answer while that is done, nobody can know what it does: then the other stays stopped, and the error
says so.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Set

from ...device import Capability, Device, RunState
from ...device.rules import ALTERNATIVES
from ...errors import MissingCapability, StateError, VdpaBridgeError
from ...linux.files import replacing
from ...linux.signals import uninterrupted
from ..image.fit import check_fits, check_memory, facts_of
from ..image.reader import ImageReader
from ..image.writer import ImageFacts, ImageWriter
from ..losses import Loss, StateWouldBeLost, require_accepted, unsavable
from ..report import Report
from ..snapshot import DeviceSnapshot, QueueEventfds, capture, eventfds_of, place, prepare, restore
from ..transfer.carry import carry_state, read_state, spool_state, write_state
from ..transfer.channel import Limits, enlarge, write_all
from ..transfer.stream import reading
from .outcome import Advice, ProcedureFailed
from .undo import Undo

__all__ = [
    "Advice",
    "Loss",
    "ProcedureFailed",
    "StateWouldBeLost",
    "load",
    "load_state",
    "migrate",
    "save",
    "save_file",
    "verify",
]


def save(device: Device, sink: int, limits: Limits, *, go_on: bool = True, accept: Set[Loss] = frozenset()) -> Report:
    """Write the image of ``device`` to ``sink`` (borrowed).

    A running device is suspended for it, and resumes afterwards (with ``go_on``), and where saving fails in any case.
    ``accept``: what of its state may be missing in the image. Raises `StateError`, `MissingCapability` or
    `StateWouldBeLost` before anything was done, `ProcedureFailed` after that.
    """
    undo = _prepare(device, "save", accept)
    with undo:
        with device.limit.within(limits.deadline):
            _write_image(device, sink, limits, undo)
        if go_on:
            undo.resume_source("resume")
    return undo.report


def save_file(
    device: Device, path: str, limits: Limits, *, go_on: bool = True, accept: Set[Loss] = frozenset()
) -> Report:
    """Save to file ``path``, which is there whole or, where this raises, as it was before; raises as `save` does.

    Only when the file is safe does the device resume: where only that fails, the error says so, and the file is there.
    """
    undo = _prepare(device, "save", accept)
    with undo:
        with device.limit.within(limits.deadline), replacing(path) as fd:
            _write_image(device, fd, limits, undo)
        if go_on:
            undo.resume_source("resume")
    return undo.report


def verify(source: int, limits: Limits, device: Device | None = None, *, accept: Set[Loss] = frozenset()) -> ImageFacts:
    """Read the image in ``source`` (borrowed) to its end; with ``device``, see whether it would take it.

    Raises `ImageError` for one that is damaged, `SnapshotError` or `FeatureError` for one that does not fit.
    """
    reader = ImageReader(reading(source, limits))
    for _ in reader.state():
        continue
    if device is not None:
        check_fits(reader.facts, device, accept)
    return reader.facts


def load(
    device: Device,
    source: int,
    limits: Limits,
    eventfds: Mapping[int, QueueEventfds],
    *,
    start: bool | None = None,
    accept: Set[Loss] = frozenset(),
) -> Report:
    """Bring reset ``device`` to where the image in ``source`` (borrowed) was taken.

    ``start``: whether it is started there; None for a device that was at work when it was saved. ``accept``: what of
    its state it may lack.

    The image is read and verified to its end before the device sees anything of it. The guest's memory is the
    caller's to map before, the eventfds are those of this process. Raises `ImageError`, `SnapshotError`,
    `FeatureError`, `StateError`, `StateWouldBeLost` before the device was touched; `ProcedureFailed` after that, and
    the device is reset.
    """
    return _load(device, source, limits, eventfds, start=start, accept=accept)


def load_state(device: Device, source: int, limits: Limits, *, accept: Set[Loss] = frozenset()) -> Report:
    """Give reset ``device`` its own state out of the image in ``source`` (borrowed), and nothing else of it.

    For a device whose features and queues somebody else sets up, as a front-end does. Raises as `load` does.
    """
    return _load(device, source, limits, None, start=False, accept=accept)


def migrate(source: Device, destination: Device, limits: Limits, *, accept: Set[Loss] = frozenset()) -> Report:
    """Have ``destination``, which is reset and has the guest's memory mapped, work on where ``source`` stops.

    A source that was never started leaves a destination that is not either. ``accept``: what of its state may be lost.

    What can be done before the source is suspended is done before: a destination without a state of its own is set up,
    short of its queues' positions. The source's eventfds become the destination's. Where a step fails the destination
    is reset and the source resumes.

    Raises `StateError`, `MissingCapability`, `SnapshotError`, `FeatureError` or `StateWouldBeLost` before anything was
    done; `ProcedureFailed` after that, which says which of the two runs.
    """
    with source.limit.within(limits.deadline), destination.limit.within(limits.deadline):
        undo = _prepare(source, "migrate", accept, destination)
        facts = facts_of(source, None)
        check_fits(facts, destination, accept)
        check_memory(facts, destination, source.regions)
    with undo, source.limit.within(limits.deadline), destination.limit.within(limits.deadline):
        _move(source, destination, facts, limits, undo)
    return undo.report


# --- steps ---


def _prepare(device: Device, what: str, accept: Set[Loss], destination: Device | None = None) -> Undo:
    """What is needed to go back; raises where ``device`` is in no state to be saved."""
    if device.state not in (RunState.CONFIGURED, RunState.RUNNING, RunState.SUSPENDED):
        legal = (RunState.CONFIGURED.value, RunState.RUNNING.value, RunState.SUSPENDED.value)
        raise StateError(device.name, what, device.state.value, legal)
    if device.undrained:
        why = "it was stopped with requests in flight, which would never be answered"
        raise VdpaBridgeError(what, device=device.name, why=why, hint="resume it, and let it drain")
    require_accepted(what, device, unsavable(device), accept, "the device cannot give it")
    if device.state is not RunState.CONFIGURED:
        needed = [Capability.SUSPEND] if device.state is RunState.RUNNING else []
        if Capability.DEVICE_STATE in device.capabilities:
            # to go back by reset and replay, it would have to give and take its state at the worst of times
            needed.append(Capability.RESUME)
        for capability in needed:
            if capability not in device.capabilities:
                raise MissingCapability(device.name, what, capability.value, ALTERNATIVES[capability])
    return Undo(what, device, destination)


def _move(
    source: Device,
    destination: Device,
    facts: ImageFacts,
    limits: Limits,
    undo: Undo,
) -> None:
    report = undo.report
    eventfds = eventfds_of(source)
    if not facts.has_state:
        with report.step("prepare"):
            _set_up(destination, source, facts.snapshot, eventfds)
    undo.snapshot = snapshot = _suspend(source, limits, undo)
    if facts.has_state:
        with report.step("device state"):
            carry_state(source, destination, limits, report)
        with report.step("check"):
            source.check_state()
            destination.check_state()
        with report.step("prepare"):
            _set_up(destination, source, snapshot, eventfds)
    with report.step("place"):
        place(destination, snapshot, eventfds)
    # no signal between a device that starts and our knowing of it, nor before the other one is out of the way
    with uninterrupted():
        if snapshot.started:
            _start(destination, snapshot, limits, undo)
        undo.finish()


def _set_up(
    destination: Device, source: Device, snapshot: DeviceSnapshot, eventfds: Mapping[int, QueueEventfds]
) -> None:
    prepare(destination, snapshot, eventfds)
    if source.config_call is not None and Capability.CONFIG_CALL in destination.capabilities:
        destination.set_config_call(source.config_call)


def _start(device: Device, snapshot: DeviceSnapshot, limits: Limits, undo: Undo) -> None:
    with undo.report.step("start"):
        undo.expect_start(snapshot)
        device.start()


def _suspend(device: Device, limits: Limits, undo: Undo) -> DeviceSnapshot:
    """Where ``device`` stands, stopped."""
    if device.state is RunState.RUNNING:
        with undo.report.step("suspend"), undo.report.watching(device):
            undo.suspending = True
            device.suspend()
    with undo.report.step("capture"):
        return capture(device)


def _write_image(device: Device, sink: int, limits: Limits, undo: Undo) -> None:
    report = undo.report
    undo.snapshot = snapshot = _suspend(device, limits, undo)
    facts = facts_of(device, snapshot)
    enlarge(sink)
    with ImageWriter(lambda data: write_all(sink, data, limits), facts) as writer:
        if facts.has_state:
            with report.step("device state"):
                read_state(device, writer, limits, report)
            with report.step("check"):
                device.check_state()
        with report.step("end"):
            report.digest = writer.end()


def _load(
    device: Device,
    source: int,
    limits: Limits,
    eventfds: Mapping[int, QueueEventfds] | None,
    *,
    start: bool | None,
    accept: Set[Loss],
) -> Report:
    if device.state is not RunState.RESET:
        raise StateError(device.name, "load", device.state.value, (RunState.RESET.value,))
    undo = Undo("load", None, device)
    report = undo.report
    with report.step("read the image"), device.limit.within(limits.deadline):
        reader = ImageReader(reading(source, limits))
        check_fits(reader.facts, device, accept)
        if eventfds is not None:
            check_memory(reader.facts, device)
        spool = spool_state(reader, limits, report)
    report.digest = reader.digest
    try:
        with undo, device.limit.within(limits.deadline):
            if reader.facts.has_state:
                with report.step("device state"):
                    write_state(device, spool, limits, report)
                with report.step("check"):
                    device.check_state()
            if eventfds is not None:
                with report.step("restore"):
                    restore(device, reader.facts.snapshot, eventfds)
            snapshot = reader.facts.snapshot
            with uninterrupted():
                if start or (start is None and snapshot.started is not False):
                    _start(device, snapshot, limits, undo)
                undo.finish()
    finally:
        os.close(spool)
    return report
