"""A vhost-user message as a line for people: numbers in hexadecimal, features by name, configuration decoded."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from typing import Any

from ...abi.configurations import CONFIGURATIONS
from ...abi.features import feature_names
from ...abi.vhost_user import VHOST_USER_F_PROTOCOL_FEATURES, FrontendRequest, ProtocolFeature
from ...abi.vhost_user_payloads import U64, Config

__all__ = ["line"]

#: From this number on, a number is an address or a set of bits.
_HEXADECIMAL_FROM = 4096
_FEATURES = (FrontendRequest.GET_FEATURES, FrontendRequest.SET_FEATURES)
_PROTOCOL_FEATURES = (FrontendRequest.GET_PROTOCOL_FEATURES, FrontendRequest.SET_PROTOCOL_FEATURES)


def line(
    request: FrontendRequest,
    payload: Any,
    answer: Any,
    error: Exception | None,
    *,
    device_id: int | None,
    begin_ns: int,
) -> str:
    """The line for ``request``, begun at ``begin_ns`` of the real-time clock, and its result: the payload of its
    ``answer``, or ``error``."""
    took_ns = time.time_ns() - begin_ns
    what = " ".join((request.name, *_shown(request, payload, device_id)))
    if error is not None:
        came = f"failed: {error}"
    else:
        came = " ".join(_shown(request, answer, device_id)) if answer is not None else "ok"
    return f"{begin_ns // 10**9}.{begin_ns % 10**9:09} {what} -> {came} ({took_ns} ns)"


def _shown(request: FrontendRequest, payload: Any, device_id: int | None) -> Iterable[str]:
    if isinstance(payload, U64):
        yield hex(payload.value)
        if request in _FEATURES:
            bits = payload.value & ~(1 << VHOST_USER_F_PROTOCOL_FEATURES)
            extra = ["PROTOCOL_FEATURES"] if bits != payload.value else []
            yield f"[{' '.join([*feature_names(bits, device_id), *extra])}]"
        if request in _PROTOCOL_FEATURES:
            yield f"[{' '.join(each.name for each in ProtocolFeature if payload.value >> each & 1)}]"
    elif isinstance(payload, Config):
        yield f"offset={payload.offset} size={payload.size_bytes}"
        yield from _configuration(payload, device_id)
    elif is_dataclass(payload):
        for field in fields(payload):
            yield f"{field.name}={_value(getattr(payload, field.name))}"


def _configuration(payload: Config, device_id: int | None) -> Iterable[str]:
    layout = CONFIGURATIONS.get(device_id or 0)
    if layout is None or payload.offset:
        yield f"data={payload.data.hex()}"
        return
    for name, value in layout.decode(payload.data).items():
        if value:
            yield f"{name}={_value(value)}"


def _value(value: Any) -> str:
    if is_dataclass(value):
        return "{" + " ".join(f"{field.name}={_value(getattr(value, field.name))}" for field in fields(value)) + "}"
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, tuple):
        return f"[{', '.join(map(_value, value))}]"
    return hex(value) if isinstance(value, int) and value >= _HEXADECIMAL_FROM else str(value)
