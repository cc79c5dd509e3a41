"""The everyday calls, as `vdpabridge` offers them: each does the usual thing, with a deadline.

What they are made of is in `vdpabridge.drivers.opening` and `vdpabridge.state`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from .device import Device
from .drivers.opening import open_device
from .linux.deadline import Deadline
from .state import procedures
from .state.image.opening import open_image
from .state.losses import Loss
from .state.report import Report
from .state.snapshot import QueueEventfds
from .state.transfer.channel import Limits

__all__ = ["Progress", "inspect", "load", "load_state", "migrate", "open", "save"]

#: Told, now and then, how many bytes of device state have gone through.
Progress = Callable[[int], None]
#: An image: its path, or a descriptor (borrowed) to read it from or to write it to.
Image = str | os.PathLike[str] | int


def open(name: str, *, timeout_s: float | None = 30.0) -> Device:  # it is called vdpabridge.open
    """Open the device called ``name``: ``vdpa:blk0``, ``/dev/vhost-vdpa-0``, ``vhost-user:/run/virtiofsd.sock,id=fs``,
    ``sim:blk`` or ``sim:fs``; `vdpabridge.drivers.names.DEVICE_HELP` has all forms.

    The caller owns the device: use it as a context manager. ``timeout_s`` bounds each of its operations; None waits for
    ever. Raises `UsageError` for what is not a device's name, `NoSuchDevice`, `KernelError`, `ProtocolError`.
    """
    return open_device(name, timeout_s=timeout_s)


def save(
    device: Device,
    image: Image,
    *,
    timeout_s: float | None = 300.0,
    stay_suspended: bool = False,
    accept: Iterable[Loss] = (),
    size_limit_bytes: int | None = None,
    progress: Progress | None = None,
) -> Report:
    """Save ``device`` into ``image``. A running device is suspended for it, and resumes.

    A path is written whole or, if this raises, is as it was before. With ``stay_suspended`` the device does not resume.
    ``accept``: what of its state may be missing in the image. ``size_limit_bytes``: how much device state may come.

    Raises `StateError`, `MissingCapability` or `StateWouldBeLost` before anything was done; after that
    `ProcedureFailed`, which says whether the device runs.
    """
    limits = Limits(Deadline(timeout_s), size_bytes=size_limit_bytes, progress=progress)
    losses = frozenset(accept)
    if isinstance(image, int):
        return procedures.save(device, image, limits, stay_suspended=stay_suspended, accept=losses)
    return procedures.save_file(device, os.fspath(image), limits, stay_suspended=stay_suspended, accept=losses)


def load(
    device: Device,
    image: Image,
    *,
    eventfds: Mapping[int, QueueEventfds] | None = None,
    start: bool | None = None,
    timeout_s: float | None = 300.0,
    accept: Iterable[Loss] = (),
    size_limit_bytes: int | None = None,
    progress: Progress | None = None,
) -> Report:
    """Bring ``device``, which is reset and has the guest's memory mapped, to where ``image`` was saved.

    The device gets its state, features and queues; ``eventfds`` are those of its queues in this process. It starts if
    it was running when it was saved, or as ``start`` says. The image is verified to its end before the device sees any
    of it. Raises `ImageError`, `SnapshotError`, `FeatureError`, `StateError` or `StateWouldBeLost` before the device
    was touched; after that `ProcedureFailed`, and the device is reset.
    """
    limits = Limits(Deadline(timeout_s), size_bytes=size_limit_bytes, progress=progress)
    with _opened(image, limits) as fd:
        return procedures.load(device, fd, limits, eventfds or {}, start=start, accept=frozenset(accept))


def load_state(
    device: Device,
    image: Image,
    *,
    timeout_s: float | None = 300.0,
    accept: Iterable[Loss] = (),
    size_limit_bytes: int | None = None,
    progress: Progress | None = None,
) -> Report:
    """Give reset ``device`` its own state out of ``image``, and nothing else: a front-end sets up the rest.

    Raises as `load` does.
    """
    limits = Limits(Deadline(timeout_s), size_bytes=size_limit_bytes, progress=progress)
    with _opened(image, limits) as fd:
        return procedures.load_state(device, fd, limits, accept=frozenset(accept))


def migrate(
    source: Device,
    destination: Device,
    *,
    timeout_s: float | None = 30.0,
    accept: Iterable[Loss] = (),
    progress: Progress | None = None,
) -> Report:
    """Have ``destination``, which is reset and has the guest's memory mapped, take over where ``source`` stops.

    Afterwards the source is reset and the destination runs, if the source did. If a step fails it is the other way
    round: the destination is reset, and the source resumes. ``accept``: what of the source's state may be lost.

    Raises `StateError`, `MissingCapability`, `SnapshotError`, `FeatureError` or `StateWouldBeLost` before anything was
    done; after that `ProcedureFailed`, which says which of the two runs.
    """
    limits = Limits(Deadline(timeout_s), progress=progress)
    return procedures.migrate(source, destination, limits, accept=frozenset(accept))


def inspect(image: Image, *, timeout_s: float | None = 300.0) -> dict[str, Any]:
    """What is in ``image``, verified to its end, as ``vdpabridge inspect -j`` prints it. Raises `ImageError`."""
    from .state.image.description import describe
    from .state.image.reader import ImageReader
    from .state.transfer.stream import reading

    limits = Limits(Deadline(timeout_s))
    with _opened(image, limits) as fd:
        return describe(ImageReader(reading(fd, limits)))


@contextmanager
def _opened(image: Image, limits: Limits) -> Iterator[int]:
    if isinstance(image, int):
        yield image
        return
    fd = open_image(os.fspath(image), limits)
    try:
        yield fd
    finally:
        os.close(fd)
