"""What goes wrong on a vhost-user socket."""

from __future__ import annotations

from ..errors import VdpaBridgeError

__all__ = ["ConnectionLost", "PeerRefused", "ProtocolError"]


class ProtocolError(VdpaBridgeError):
    """The peer broke the protocol. ``request`` is the message it was about, ``code`` the peer's own error."""

    def __init__(self, what: str, *, peer: str, why: str, request: int | None = None, code: int | None = None) -> None:
        super().__init__(what, device=peer, why=why)
        self.peer = peer
        self.request = request
        self.code = code


class PeerRefused(ProtocolError):
    """The peer understood a request and said no; ``code`` is what it said. The connection is as good as before."""


class ConnectionLost(ProtocolError, ConnectionError):
    """The peer is gone."""
