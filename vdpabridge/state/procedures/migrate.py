"""Migrate: one device continues where another stops."""

from __future__ import annotations

from collections.abc import Mapping, Set

from ...device import Capability, Device
from ...linux.signals import uninterrupted
from ..image.fit import check_fits, check_memory, facts_of
from ..image.writer import ImageFacts
from ..losses import Loss
from ..report import Report
from ..snapshot import DeviceSnapshot, QueueEventfds, eventfds_of, outline, place, prepare
from ..transfer.carry import carry_state
from ..transfer.channel import Limits
from .steps import begin, start_from, suspend
from .transaction import Transaction

__all__ = ["migrate"]


def migrate(source: Device, destination: Device, limits: Limits, *, accept: Set[Loss] = frozenset()) -> Report:
    """Make ``destination``, which is reset and has the guest's memory mapped, continue where ``source`` stops.

    If the source was never started, the destination is not started either. ``accept``: which state may be lost.

    If the source has no state of its own, the destination is set up, except for its queues' positions, before the
    source is suspended. The source's eventfds become the destination's. If a step fails, the destination is reset and
    the source resumes.

    Raises `StateError`, `MissingCapability`, `SnapshotError`, `FeatureError` or `StateWouldBeLost` before anything was
    done; `ProcedureFailed` after that, which says which of the two runs.
    """
    with source.limit.within(limits.deadline), destination.limit.within(limits.deadline):
        transaction = begin(source, "migrate", accept, destination)
        facts = facts_of(source, outline(source))
        check_fits(facts, destination, accept)
        check_memory(facts, destination, source.regions)
    with transaction, source.limit.within(limits.deadline), destination.limit.within(limits.deadline):
        _move(source, destination, facts, limits, transaction)
    return transaction.report


def _move(
    source: Device,
    destination: Device,
    facts: ImageFacts,
    limits: Limits,
    transaction: Transaction,
) -> None:
    report = transaction.report
    eventfds = eventfds_of(source)
    if not facts.has_state:
        with report.step("prepare"):
            _set_up(destination, source, facts.snapshot, eventfds)
    transaction.snapshot = snapshot = suspend(source, transaction)
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
    # no signal between the start of a device and the record of it, nor before the source was reset
    with uninterrupted():
        if snapshot.started:
            start_from(destination, snapshot, transaction)
        transaction.commit()


def _set_up(
    destination: Device, source: Device, snapshot: DeviceSnapshot, eventfds: Mapping[int, QueueEventfds]
) -> None:
    prepare(destination, snapshot, eventfds)
    if source.config_call is not None and Capability.CONFIG_CALL in destination.capabilities:
        destination.set_config_call(source.config_call)
