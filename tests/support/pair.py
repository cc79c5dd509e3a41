"""A vhost-user front-end and back-end in one process: our driver, and our exporter over any device, in a thread."""

import socket
import threading
from contextlib import contextmanager

from vdpabridge.drivers.vhost_user import VhostUser
from vdpabridge.export.vhost_user import Server
from vdpabridge.vhost_user.connection import Connection


@contextmanager
def served(device, reports=None, **options):
    """A connected socket, its peer served ``device`` by a thread until the end; what it reports goes to ``reports``."""
    ours, theirs = socket.socketpair()
    reports = [] if reports is None else reports
    with Server(device, report=reports.append, timeout_s=5, **options) as server:
        connection = Connection(theirs, "the front-end", timeout_s=5)
        thread = threading.Thread(target=server.serve_connection, args=[connection])
        thread.start()
        try:
            yield ours
        finally:
            server.stop()
            thread.join()
            ours.close()


@contextmanager
def bridged(device, reports=None, *, timeout_s=5, **options):
    """``device`` as our driver sees it through a vhost-user socket."""
    identity = device.identity
    with (
        served(device, reports, **options) as ours,
        VhostUser(
            Connection(ours, "the back-end"),
            device_id=identity.device_id,
            config_size_bytes=identity.config_size_bytes,
            timeout_s=timeout_s,
        ) as front,
    ):
        front.timeout_s = timeout_s
        yield front
