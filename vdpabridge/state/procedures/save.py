"""Save: the image of a device, which resumes afterwards."""

from __future__ import annotations

from collections.abc import Set

from ...device import Device
from ...linux.files import replacing
from ..image.fit import facts_of
from ..image.writer import ImageWriter
from ..losses import Loss
from ..report import Report
from ..transfer.carry import read_state
from ..transfer.channel import Limits, enlarge, write_all
from .steps import begin, suspend
from .transaction import Transaction

__all__ = ["save", "save_file"]


def save(
    device: Device, sink: int, limits: Limits, *, stay_suspended: bool = False, accept: Set[Loss] = frozenset()
) -> Report:
    """Write the image of ``device`` to ``sink`` (borrowed).

    A running device is suspended for it. It resumes afterwards (unless ``stay_suspended``), and always if saving fails.
    ``accept``: which state may be missing in the image. Raises `StateError`, `MissingCapability` or
    `StateWouldBeLost` before anything was done, `ProcedureFailed` after that.
    """
    transaction = begin(device, "save", accept, resumes=not stay_suspended)
    with transaction:
        with device.limit.within(limits.deadline):
            _write_image(device, sink, limits, transaction)
        if not stay_suspended:
            transaction.resume_source("resume")
    return transaction.report


def save_file(
    device: Device, path: str, limits: Limits, *, stay_suspended: bool = False, accept: Set[Loss] = frozenset()
) -> Report:
    """Save to file ``path``, which then is complete, or as it was before if this raises; raises as `save` does.

    The device resumes only when the file is safe. If only that fails, the error says so, and the file is there.
    """
    transaction = begin(device, "save", accept, resumes=not stay_suspended)
    with transaction:
        with device.limit.within(limits.deadline), replacing(path) as fd:
            _write_image(device, fd, limits, transaction)
        if not stay_suspended:
            transaction.resume_source("resume")
    return transaction.report


def _write_image(device: Device, sink: int, limits: Limits, transaction: Transaction) -> None:
    report = transaction.report
    transaction.snapshot = snapshot = suspend(device, transaction)
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
