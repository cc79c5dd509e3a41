"""What belongs to each vhost-user request: payload, reply, descriptors, and the protocol feature it needs.

There is one table for each direction. Dispatch, validation, errors and tracing read it, and nothing repeats it. If the
specification's text and its implementations differ, a comment says so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .vhost_user import BackendRequest as B, FrontendRequest as F, ProtocolFeature as P
from .vhost_user_payloads import (
    U64,
    Config,
    DeviceStateTransfer,
    Empty,
    Inflight,
    Iotlb,
    Log,
    MemoryTable,
    Mmap,
    Opaque,
    SharedObject,
    ShmemConfig,
    SingleRegion,
    VringAddr,
    VringArea,
    VringState,
)

__all__ = ["BACKEND_REQUESTS", "FRONTEND_REQUESTS", "PER_REGION", "RequestSpec"]

#: As many descriptors as the memory table has regions.
PER_REGION = -1


@dataclass(frozen=True, slots=True)
class RequestSpec:
    """One row: ``reply`` is the payload of the request's own reply, None if the only reply is the optional U64 one."""

    payload: Any
    reply: Any = None
    fds: tuple[int, int] = (0, 0)
    """Fewest and most descriptors that come with the request; `PER_REGION` for a memory table."""
    reply_fds: tuple[int, int] = (0, 0)
    needs: P | None = None


_ONE, _MAY = (1, 1), (0, 1)

FRONTEND_REQUESTS: dict[F, RequestSpec] = {
    F.GET_FEATURES: RequestSpec(Empty, U64),
    F.SET_FEATURES: RequestSpec(U64),
    F.SET_OWNER: RequestSpec(Empty),
    F.RESET_OWNER: RequestSpec(Empty),
    F.SET_MEM_TABLE: RequestSpec(MemoryTable, fds=(PER_REGION, PER_REGION)),
    F.SET_LOG_BASE: RequestSpec(Log, Log, fds=_ONE, needs=P.LOG_SHMFD),
    F.SET_LOG_FD: RequestSpec(Empty, fds=_ONE),
    F.SET_VRING_NUM: RequestSpec(VringState),
    F.SET_VRING_ADDR: RequestSpec(VringAddr),
    F.SET_VRING_BASE: RequestSpec(VringState),
    F.GET_VRING_BASE: RequestSpec(VringState, VringState),
    F.SET_VRING_KICK: RequestSpec(U64, fds=_MAY),
    F.SET_VRING_CALL: RequestSpec(U64, fds=_MAY),
    F.SET_VRING_ERR: RequestSpec(U64, fds=_MAY),
    F.GET_PROTOCOL_FEATURES: RequestSpec(Empty, U64),
    F.SET_PROTOCOL_FEATURES: RequestSpec(U64),
    F.GET_QUEUE_NUM: RequestSpec(Empty, U64, needs=P.MQ),
    F.SET_VRING_ENABLE: RequestSpec(VringState),
    F.SEND_RARP: RequestSpec(U64, needs=P.RARP),
    F.NET_SET_MTU: RequestSpec(U64, needs=P.NET_MTU),
    F.SET_BACKEND_REQ_FD: RequestSpec(Empty, fds=_ONE, needs=P.BACKEND_REQ),
    F.IOTLB_MSG: RequestSpec(Iotlb, U64),
    F.SET_VRING_ENDIAN: RequestSpec(VringState, needs=P.CROSS_ENDIAN),
    F.GET_CONFIG: RequestSpec(Config, Config, needs=P.CONFIG),
    F.SET_CONFIG: RequestSpec(Config, needs=P.CONFIG),
    F.CREATE_CRYPTO_SESSION: RequestSpec(Opaque, Opaque, needs=P.CRYPTO_SESSION),
    F.CLOSE_CRYPTO_SESSION: RequestSpec(U64, needs=P.CRYPTO_SESSION),
    F.POSTCOPY_ADVISE: RequestSpec(Empty, Empty, reply_fds=_ONE, needs=P.PAGEFAULT),
    F.POSTCOPY_LISTEN: RequestSpec(Empty, needs=P.PAGEFAULT),
    F.POSTCOPY_END: RequestSpec(Empty, U64, needs=P.PAGEFAULT),
    # the specification says that the reply brings no descriptor; QEMU and libvhost-user send one
    F.GET_INFLIGHT_FD: RequestSpec(Inflight, Inflight, reply_fds=_ONE, needs=P.INFLIGHT_SHMFD),
    F.SET_INFLIGHT_FD: RequestSpec(Inflight, fds=_ONE, needs=P.INFLIGHT_SHMFD),
    F.GPU_SET_SOCKET: RequestSpec(Empty, fds=_ONE),
    F.RESET_DEVICE: RequestSpec(Empty, needs=P.RESET_DEVICE),
    F.VRING_KICK: RequestSpec(VringState, needs=P.INBAND_NOTIFICATIONS),
    F.GET_MAX_MEM_SLOTS: RequestSpec(Empty, U64, needs=P.CONFIGURE_MEM_SLOTS),
    # the specification lists the region as the reply of these two, but it is the payload of the request
    F.ADD_MEM_REG: RequestSpec(SingleRegion, fds=_ONE, needs=P.CONFIGURE_MEM_SLOTS),
    F.REM_MEM_REG: RequestSpec(SingleRegion, fds=_MAY, needs=P.CONFIGURE_MEM_SLOTS),
    F.SET_STATUS: RequestSpec(U64, needs=P.STATUS),
    F.GET_STATUS: RequestSpec(Empty, U64, needs=P.STATUS),
    F.GET_SHARED_OBJECT: RequestSpec(SharedObject, Empty, reply_fds=_MAY, needs=P.SHARED_OBJECT),
    F.SET_DEVICE_STATE_FD: RequestSpec(DeviceStateTransfer, U64, fds=_ONE, reply_fds=_MAY, needs=P.DEVICE_STATE),
    F.CHECK_DEVICE_STATE: RequestSpec(Empty, U64, needs=P.DEVICE_STATE),
    F.GET_SHMEM_CONFIG: RequestSpec(Empty, ShmemConfig, needs=P.SHMEM),
    F.GET_VRING_BASE_SKIP_DRAIN: RequestSpec(VringState, VringState, needs=P.GET_VRING_BASE_SKIP_DRAIN),
}

BACKEND_REQUESTS: dict[B, RequestSpec] = {
    B.IOTLB_MSG: RequestSpec(Iotlb),
    B.CONFIG_CHANGE_MSG: RequestSpec(Empty, needs=P.CONFIG),
    B.VRING_HOST_NOTIFIER_MSG: RequestSpec(VringArea, fds=_MAY, needs=P.HOST_NOTIFIER),
    B.VRING_CALL: RequestSpec(VringState, needs=P.INBAND_NOTIFICATIONS),
    B.VRING_ERR: RequestSpec(VringState, needs=P.INBAND_NOTIFICATIONS),
    B.SHARED_OBJECT_ADD: RequestSpec(SharedObject, needs=P.SHARED_OBJECT),
    B.SHARED_OBJECT_REMOVE: RequestSpec(SharedObject, needs=P.SHARED_OBJECT),
    B.SHARED_OBJECT_LOOKUP: RequestSpec(SharedObject, U64, reply_fds=_MAY, needs=P.SHARED_OBJECT),
    B.SHMEM_MAP: RequestSpec(Mmap, fds=_ONE, needs=P.SHMEM),
    B.SHMEM_UNMAP: RequestSpec(Mmap, needs=P.SHMEM),
}
