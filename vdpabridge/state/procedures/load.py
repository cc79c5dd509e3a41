"""Load: bring a device to where an image was taken."""

from __future__ import annotations

import os
from collections.abc import Mapping, Set

from ...device import Device, RunState
from ...errors import StateError
from ...linux.signals import uninterrupted
from ..image.fit import check_fits, check_memory
from ..image.reader import ImageReader
from ..image.writer import ImageFacts
from ..losses import Loss
from ..report import Report
from ..snapshot import QueueEventfds, restore
from ..transfer.carry import spool_state, write_state
from ..transfer.channel import Limits
from ..transfer.stream import reading
from .steps import start_from
from .transaction import Transaction

__all__ = ["load", "load_state", "require_loadable", "verify"]


def verify(source: int, limits: Limits, device: Device | None = None, *, accept: Set[Loss] = frozenset()) -> ImageFacts:
    """Read the image in ``source`` (borrowed) to its end; with ``device``, check whether it would accept it.

    Raises `ImageError` if the image is damaged, `SnapshotError` or `FeatureError` if it does not fit.
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
    """Bring the reset ``device`` to where the image in ``source`` (borrowed) was taken.

    ``start``: whether to start it there; None: if the image was saved from a device at work. ``accept``: which state
    the device may lack.

    The image is read and verified to its end before the device sees anything of it. The caller maps the guest's memory
    before; the eventfds are those of this process. Raises `ImageError`, `SnapshotError`,
    `FeatureError`, `StateError`, `StateWouldBeLost` before the device was touched; `ProcedureFailed` after that, and
    the device is reset.
    """
    return _load(device, source, limits, eventfds, start=start, accept=accept)


def load_state(device: Device, source: int, limits: Limits, *, accept: Set[Loss] = frozenset()) -> Report:
    """Give the reset ``device`` its own state from the image in ``source`` (borrowed), and nothing else of it.

    For a device whose features and queues a front-end sets up. Raises as `load` does.
    """
    return _load(device, source, limits, None, start=False, accept=accept)


def require_loadable(device: Device) -> None:
    """Raise `StateError` if ``device`` is not in the state in which it takes another's."""
    if device.state is not RunState.RESET:
        raise StateError(device.name, "load", device.state.value, (RunState.RESET.value,))


def _load(
    device: Device,
    source: int,
    limits: Limits,
    eventfds: Mapping[int, QueueEventfds] | None,
    *,
    start: bool | None,
    accept: Set[Loss],
) -> Report:
    require_loadable(device)
    transaction = Transaction("load", None, device)
    report = transaction.report
    with report.step("read the image"), device.limit.within(limits.deadline):
        reader = ImageReader(reading(source, limits))
        check_fits(reader.facts, device, accept)
        if eventfds is not None:
            check_memory(reader.facts, device)
        spool = spool_state(reader, limits, report)
    report.digest = reader.digest
    try:
        with transaction, device.limit.within(limits.deadline):
            if reader.facts.has_state:
                with report.step("device state"):
                    write_state(device, spool, limits, report)
                with report.step("check"):
                    device.check_state()
            if eventfds is not None:
                with report.step("restore"):
                    restore(device, reader.facts.snapshot, eventfds)
            snapshot = reader.facts.snapshot
            limits.check_cancelled()
            with uninterrupted():
                if start or (start is None and snapshot.started is not False):
                    start_from(device, snapshot, transaction)
                transaction.commit()
    finally:
        os.close(spool)
    return report
