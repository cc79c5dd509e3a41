"""vhost-vdpa as a `System`: drivers/vhost/vdpa.c over a parent whose manners can be chosen, one flag a difference.

For what no simulator does: parents without SUSPEND, bases refused or stale, statuses that do not stick, signals.
Requests that vdpa.c handles alike for all parents behave as tests/vm/test_errno_matrix.py shows them to on 7.2.
"""

import os
import struct
import threading
from dataclasses import dataclass
from errno import EBUSY, EFAULT, EINVAL, EIO, ENOBUFS, ENOENT, ENOTTY, EOPNOTSUPP, EPERM

from vdpabridge.abi.vhost import (
    VHOST_MSG_V2_LAYOUT,
    VHOST_VDPA_CONFIG,
    VHOST_VDPA_DEVICE_STATE,
    VHOST_VRING_ADDR,
    VHOST_VRING_STATE,
    VhostIoctl as Ioctl,
)

ACK, DRIVER, DRIVER_OK, FEATURES_OK, NEEDS_RESET, FAILED = 1, 2, 4, 8, 0x40, 0x80
BASE_FEATURES = sum(1 << bit for bit in (1, 2, 3))


@dataclass
class Parent:
    """One vDPA parent driver's manners, from its source in drivers/vdpa."""

    name: str = "vdpa_sim"
    device_id: int = 2
    queues: int = 2
    queue_size_max: int = 256
    config: bytes = bytes(range(64))
    features: int = 1 << 32 | 1 << 33
    extra_backend_features: int = 0
    suspend: str = "yes"  # yes, no (no op), refuses (old firmware: offered, and then EOPNOTSUPP)
    resume: str = "yes"
    get_base: str = "yes"  # yes, unsupported (vp_vdpa, eni), while-disabled (pds), racy (ifcvf, octeon)
    set_base: str = "yes"  # yes, initial-only (vp_vdpa, eni)
    persist: bool = True
    enable_after_driver_ok: bool = True
    descriptor_groups: bool = False
    queue_sizes: bool = False
    forgets_maps: bool = False  # at a reset, unless PERSIST is acknowledged (.compat_reset)
    address_spaces: int = 1
    groups: tuple[tuple[int, int], ...] = ()  # for each queue the group of its buffers and that of its rings
    refuses_features_ok: bool = False
    fails_at_driver_ok: int = 0  # status bits that appear instead
    slow_reset_reads: int = 0  # reads of the status byte before it shows 0
    memlock_bytes: int = 1 << 62
    entries_max: int = 2048
    has_state: bool = False

    @property
    def backend_features(self):
        offers = {
            4: self.suspend != "no",
            5: self.resume != "no",
            6: self.enable_after_driver_ok,
            7: self.descriptor_groups,
            8: self.persist,
            60: self.has_state,
        }
        return BASE_FEATURES | sum(1 << bit for bit, offered in offers.items() if offered) | self.extra_backend_features


_KNOWN = frozenset(map(int, Ioctl))


class FakeKernel:
    """A `System` with one device. ``log`` keeps the names of the requests, in order."""

    def __init__(self, parent=None, *, interruptions=0, hang_on=None):
        self.parent = parent or Parent()
        self.interruptions = interruptions
        self.hang_on = hang_on
        self.release = threading.Event()
        self.log = []
        self.fd = -1
        self._reset_everything()

    def _reset_everything(self):
        self.owner = None
        self.status = 0
        self.acknowledged = 0
        self.driver_features = 0
        self.suspended = False
        self.bases = dict.fromkeys(range(self.parent.queues), 0)
        self.enabled = dict.fromkeys(range(self.parent.queues), False)
        self.eventfds = {}
        self.iotlb = {}
        self.device_maps = {}
        """What the device itself has of it."""
        self.set_map_count = 0
        self.touched = set()
        """Address spaces that exist: the first UPDATE or BATCH_BEGIN makes one."""
        self.in_batch = None
        self.pending_reset_reads = 0
        self.group_spaces = {}
        self.transfer = None
        """The direction of the transfer that was not checked."""
        self.state_fds = []
        """Every descriptor that was made for one."""
        self.checks = []
        """What the next checks answer; 0 if there is nothing."""

    # --- the system calls ---

    def open(self, path):
        if path != "/dev/vhost-vdpa-0":
            raise OSError(ENOENT, os.strerror(ENOENT))
        if self.fd >= 0:
            raise OSError(EBUSY, os.strerror(EBUSY))
        self._reset_everything()
        self.fd = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
        return self.fd

    def close(self, fd):
        assert fd == self.fd
        os.close(fd)
        self.fd = -1

    def write(self, fd, data):
        assert fd == self.fd
        if len(data) < 40:
            raise OSError(EINVAL, os.strerror(EINVAL))
        kind, asid, iova, size, _address, perm, message = VHOST_MSG_V2_LAYOUT.unpack(data)
        if kind != 2 or (message == 2 and size == 0):
            raise OSError(EINVAL, os.strerror(EINVAL))
        self._interrupt()
        self.log.append(
            ("IOTLB", {2: "UPDATE", 3: "INVALIDATE", 5: "BATCH_BEGIN", 6: "BATCH_END"}.get(message, message))
        )
        if self.owner is None or not self._iotlb_message(message, asid, iova, size, perm):
            raise OSError(EFAULT, os.strerror(EFAULT))
        return 72

    def ioctl(self, fd, request, argument):
        assert fd == self.fd
        if request not in _KNOWN:
            raise OSError(ENOTTY, os.strerror(ENOTTY))
        name = Ioctl(request).name
        self._interrupt()
        self.log.append(name)
        if name == self.hang_on:
            self.release.wait(10)
        code = getattr(self, name.lower())(argument)
        if code:
            raise OSError(code, os.strerror(code))
        return 0

    def _interrupt(self):
        if self.interruptions:
            self.interruptions -= 1
            raise InterruptedError

    # --- drivers/vhost/vdpa.c ---

    def _iotlb_message(self, message, asid, iova, size, perm):
        if asid >= self.parent.address_spaces:
            return False
        space = self.iotlb.setdefault(asid, {})
        end = iova + size
        overlapping = [start for start, length in space.items() if start < end and iova < start + length]
        if message == 2:
            pinned = sum(length for space in self.iotlb.values() for length in space.values())
            if overlapping or len(space) >= self.parent.entries_max or pinned + size > self.parent.memlock_bytes:
                return False
            assert perm in (1, 2, 3)
            space[iova] = size
        elif message == 3:
            if asid not in self.touched:
                return False
            for start in overlapping:
                del space[start]
        elif message in (5, 6):
            if self.in_batch not in (None, asid):
                return False
            if message == 6 and asid not in self.touched:
                return False
            self.in_batch = asid if message == 5 else None
        self.touched.add(asid)
        if message in (2, 3, 6) and self.in_batch is None:
            self.set_map_count += 1
            self.device_maps[asid] = dict(space)
        return message in (2, 3, 5, 6)

    def vhost_set_owner(self, _):
        if self.owner is not None:
            return EBUSY
        self.owner = os.getpid()
        return 0

    def _put(self, argument, code, *values):
        argument[:] = struct.pack("=" + code, *values)
        return 0

    def vhost_get_backend_features(self, argument):
        return self._put(argument, "Q", self.parent.backend_features)

    def vhost_set_backend_features(self, argument):
        wanted = struct.unpack("=Q", argument)[0]
        for bit in (4, 5, 7, 8, 60):
            if wanted >> bit & 1 and not self.parent.backend_features >> bit & 1:
                return EOPNOTSUPP
        if wanted & ~(0x1FE | 1 << 60):
            return EOPNOTSUPP
        if wanted >> 7 & 1 and not wanted >> 3 & 1:
            return EINVAL
        self.acknowledged = wanted
        return 0

    def vhost_vdpa_get_device_id(self, argument):
        return self._put(argument, "I", self.parent.device_id)

    def vhost_vdpa_get_vqs_count(self, argument):
        return self._put(argument, "I", self.parent.queues)

    def vhost_vdpa_get_vring_num(self, argument):
        return self._put(argument, "H", self.parent.queue_size_max)

    def vhost_vdpa_get_config_size(self, argument):
        return self._put(argument, "I", len(self.parent.config))

    def vhost_vdpa_get_group_num(self, argument):
        groups = {group for pair in self.parent.groups for group in pair}
        return self._put(argument, "I", max(groups, default=self.parent.address_spaces - 1) + 1)

    def vhost_vdpa_get_as_num(self, argument):
        return self._put(argument, "I", self.parent.address_spaces)

    def vhost_vdpa_get_iova_range(self, argument):
        return self._put(argument, "QQ", 0, (1 << 48) - 1)

    def vhost_get_features(self, argument):
        return self._put(argument, "Q", self.parent.features)

    def vhost_set_features(self, argument):
        if self.status & FEATURES_OK:
            return EBUSY
        wanted = struct.unpack("=Q", argument)[0]
        if not wanted >> 33 & 1:
            return EINVAL
        self.driver_features = wanted & self.parent.features
        return 0

    def vhost_vdpa_get_status(self, argument):
        shown = self.status
        if self.pending_reset_reads:
            self.pending_reset_reads -= 1
            shown = ACK | DRIVER
        return self._put(argument, "B", shown)

    def vhost_vdpa_set_status(self, argument):
        wanted = argument[0]
        if wanted and self.status & ~wanted:
            return EINVAL
        if wanted == 0:
            self.status = 0
            self.suspended = False
            self.driver_features = 0
            self.bases = dict.fromkeys(self.bases, 0)
            self.enabled = dict.fromkeys(self.enabled, False)
            self.pending_reset_reads = self.parent.slow_reset_reads
            self.group_spaces = {}
            self.transfer = None
            if self.parent.forgets_maps and not self.acknowledged >> 8 & 1:
                self.device_maps.clear()
            return 0
        if wanted & FEATURES_OK and self.parent.refuses_features_ok:
            wanted &= ~FEATURES_OK
        if wanted & DRIVER_OK and self.parent.fails_at_driver_ok:
            wanted = wanted & ~DRIVER_OK | self.parent.fails_at_driver_ok
        self.status = wanted  # void in the kernel: whatever the device made of it, the answer is 0
        return 0

    def _config(self, argument):
        offset, length = VHOST_VDPA_CONFIG.unpack(argument)
        whole = len(self.parent.config)
        return (offset, length) if length and offset <= whole and length <= whole - offset else None

    def vhost_vdpa_get_config(self, argument):
        if (place := self._config(argument)) is None:
            return EINVAL
        argument[8:] = self.parent.config[place[0] : place[0] + place[1]]
        return 0

    def vhost_vdpa_set_config(self, argument):
        return 0 if self._config(argument) else EINVAL

    def vhost_vdpa_set_config_call(self, argument):
        self.eventfds["config"] = struct.unpack("=i", argument)[0]
        return 0

    def _queue(self, argument):
        index, number = VHOST_VRING_STATE.unpack(argument)
        if self.owner != os.getpid():
            return EPERM, index, number
        return (0 if index < self.parent.queues else ENOBUFS), index, number

    @property
    def _running(self):
        return bool(self.status & DRIVER_OK) and not self.suspended

    def vhost_set_vring_num(self, argument):
        code, _, number = self._queue(argument)
        return code or (0 if 0 < number <= self.parent.queue_size_max and not number & (number - 1) else EINVAL)

    def vhost_set_vring_addr(self, argument):
        index, flags, _desc, used, avail, _log = VHOST_VRING_ADDR.unpack(argument)
        if index >= self.parent.queues:
            return ENOBUFS
        if flags & ~1:
            return EOPNOTSUPP
        return EINVAL if avail & 1 or used & 3 or self._running else 0

    def vhost_set_vring_base(self, argument):
        code, index, number = self._queue(argument)
        if code or self._running:
            return code or EINVAL
        packed = self.driver_features >> 34 & 1
        if not packed and number > 0xFFFF:
            return EINVAL
        if self.parent.set_base == "initial-only" and number != (0x80008000 if packed else 0):
            return EOPNOTSUPP
        self.bases[index] = number
        return 0

    def vhost_get_vring_base(self, argument):
        code, index, _ = self._queue(argument)
        if code:
            return code
        if self.parent.get_base == "unsupported":
            return EOPNOTSUPP
        if self.parent.get_base == "while-disabled" and self.enabled[index]:
            return EINVAL
        return self._put(argument, "II", index, self.bases[index])

    def vhost_vdpa_set_vring_enable(self, argument):
        code, index, number = self._queue(argument)
        if not code:
            self.enabled[index] = bool(number)
        return code

    def _eventfd(self, kind, argument):
        code, index, _ = self._queue(argument)
        if not code:
            self.eventfds[kind, index] = struct.unpack("=Ii", argument)[1]
        return code

    def vhost_set_vring_kick(self, argument):
        return self._eventfd("kick", argument)

    def vhost_set_vring_call(self, argument):
        return self._eventfd("call", argument)

    def vhost_set_vring_err(self, argument):
        return self._eventfd("err", argument)

    def vhost_vdpa_get_vring_group(self, argument):
        code, index, _ = self._queue(argument)
        return code or self._put(argument, "II", index, self.parent.groups[index][0] if self.parent.groups else 0)

    def vhost_vdpa_get_vring_desc_group(self, argument):
        code, index, _ = self._queue(argument)
        if not self.parent.descriptor_groups:
            return EOPNOTSUPP
        return code or self._put(argument, "II", index, self.parent.groups[index][1])

    def vhost_vdpa_get_vring_size(self, argument):
        code, index, _ = self._queue(argument)
        if not self.parent.queue_sizes:
            return EOPNOTSUPP
        return code or self._put(argument, "II", index, self.parent.queue_size_max)

    def vhost_vdpa_set_group_asid(self, argument):
        group, space = VHOST_VRING_STATE.unpack(argument)
        known = {group for pair in self.parent.groups for group in pair} or set(range(self.parent.address_spaces))
        if space >= self.parent.address_spaces or group not in known:
            return EINVAL
        self.group_spaces[group] = space
        return 0

    def _run_control(self, manner, suspended):
        if not self.status & DRIVER_OK:
            return 0  # the trap: success, and nothing happened
        code = {"yes": 0, "no": EOPNOTSUPP, "refuses": EOPNOTSUPP, "dies": EIO}[manner]
        if not code:
            self.suspended = suspended
        return code

    def vhost_vdpa_suspend(self, _):
        return self._run_control(self.parent.suspend, True)

    def vhost_vdpa_resume(self, _):
        if self.parent.resume == "unknown":
            return ENOTTY
        return self._run_control(self.parent.resume, False)

    def vhost_vdpa_set_device_state_fd(self, argument):
        direction, phase, fd, flags = VHOST_VDPA_DEVICE_STATE.unpack(argument)
        if not self.parent.has_state:
            return EOPNOTSUPP
        if (phase, fd, flags) != (0, -1, 0):
            return EINVAL
        if direction == 2:
            self.transfer = None
            return 0
        if self._running or self.transfer is not None:
            return EBUSY
        self.transfer = direction
        self.state_fds.append(os.memfd_create("state", os.MFD_CLOEXEC))
        return self._put(argument, "IIiI", direction, phase, self.state_fds[-1], flags)

    def vhost_vdpa_check_device_state(self, _):
        if self.transfer is None:
            return EINVAL
        code = self.checks.pop(0) if self.checks else 0
        if code != EBUSY:
            self.transfer = None
        return code
