"""Somebody's proposal for device state: a TOML file that says which of a header's requests do what.

For example::

    header = "include/uapi/linux/vhost.h"       # beside this file, if it is not absolute
    feature = "VHOST_BACKEND_F_MY_STATE"        # a constant of the header, or a number

    [save]
    request = "VHOST_VDPA_MY_TRANSFER"          # of the header, or NUMBER:SIZE
    descriptor = "fd"                           # the member that gets the descriptor, or "return"
    direction = "MY_STATE_SAVE"                 # what other members are: constants, or numbers
    fd = -1

    [load]
    request = "VHOST_VDPA_MY_TRANSFER"
    descriptor = "fd"
    direction = "MY_STATE_LOAD"
    fd = -1

    [check]
    request = "VHOST_VDPA_MY_CHECK"

    [cancel]                                    # may be missing
    request = "VHOST_VDPA_MY_CANCEL"
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...errors import VdpaBridgeError
from ...uapi.arguments import call_of
from ...uapi.header import Header, read_header
from .state_requests import OURS, RETURNED, StateRequest, StateRequests

__all__ = ["UAPI_VARIABLE", "read_proposal", "state_requests"]

#: The environment variable that names a file for `state_requests`.
UAPI_VARIABLE = "VDPABRIDGE_UAPI"
_REQUESTS = ("save", "load", "check", "cancel")


def state_requests(path: str | None = None) -> StateRequests:
    """Those in the TOML file at ``path``, or at $VDPABRIDGE_UAPI; those of this project if there is neither."""
    path = path or os.environ.get(UAPI_VARIABLE)
    return read_proposal(path) if path else OURS


def read_proposal(path: str) -> StateRequests:
    """The requests that the TOML file at ``path`` names. Raises `VdpaBridgeError` for what is wrong with it."""
    try:
        facts = tomllib.loads(Path(path).read_text())
    except OSError as error:
        raise _wrong(path, error.strerror or str(error)) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise _wrong(path, str(error)) from None
    if unknown := facts.keys() - {"header", "feature", *_REQUESTS}:
        raise _wrong(path, f"it has {', '.join(sorted(unknown))}, which means nothing here")
    if missing := {"header", "feature", "save", "load", "check"} - facts.keys():
        raise _wrong(path, f"it has no {', '.join(sorted(missing))}")
    header = read_header(str(Path(path).parent / str(facts["header"])))
    requests = {name: _request(path, name, facts[name], header) for name in _REQUESTS if name in facts}
    feature = _number(path, header, facts["feature"])
    if not 0 <= feature < 64:  # bits of a 64-bit word
        raise _wrong(path, f"feature {feature} is not a bit of a 64-bit word")
    return StateRequests(feature, requests["save"], requests["load"], requests["check"], requests.get("cancel"))


def _request(path: str, name: str, table: Any, header: Header) -> StateRequest:
    if not isinstance(table, Mapping) or "request" not in table:
        raise _wrong(path, f"[{name}] has no request")
    call = call_of(str(table["request"]), header)
    members = {key: value for key, value in table.items() if key not in ("request", "descriptor")}
    argument = call.argument({key: str(_number(path, header, value)) for key, value in members.items()})
    descriptor = table.get("descriptor", "return")
    offset = next((member.offset for member in call.members if member.name == descriptor), RETURNED)
    if offset == RETURNED and descriptor != "return":
        raise _wrong(path, f"[{name}]: the argument of {call.name} has no {descriptor}")
    return StateRequest(call.number, bytes(argument) if isinstance(argument, bytearray) else b"", offset)


def _number(path: str, header: Header, value: Any) -> int:
    if isinstance(value, int):
        return int(value)
    if isinstance(value, str) and value in header.constants:
        return header.constants[value]
    raise _wrong(path, f"{value!r} is neither a number nor a constant of {header.path}")


def _wrong(path: str, why: str) -> VdpaBridgeError:
    return VdpaBridgeError("read the proposal", device=path, why=why)
