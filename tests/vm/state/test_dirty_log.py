"""A dirty log in front of the kernel's file server: it is reset for that, and keeps what its guest has open."""

from contextlib import ExitStack

from vdpabridge.device import SplitBase
from vdpabridge.drivers.vhost_vdpa import VhostVdpa
from vdpabridge.drivers.vhost_vdpa.proposal import state_requests
from vdpabridge.layers import Logged, loggable

from ...support.dirty_log import Bitmap, changed, covering
from ...support.mount import Mount


def test_what_a_file_server_answers_is_in_the_log(nodes):
    with ExitStack() as stack:
        device = stack.enter_context(loggable(VhostVdpa.open(nodes[0], timeout_s=60, state_requests=state_requests())))
        assert isinstance(device, Logged)
        mount = Mount(stack, device)
        bitmap = stack.enter_context(Bitmap(mount.memory))
        content = mount.read()
        asked = covering(mount.fuse._question, 1)
        for _ in range(5):
            bitmap.clear()
            device.set_dirty_log(bitmap.log)
            assert device.marks_all == ""
            before = bytes(mount.memory.view)
            lines = mount.fuse.walk("lines")
            handle = mount.fuse.open(lines.nodeid)
            assert mount.fuse.read(lines.nodeid, handle, 0, 20_000).startswith(b"line 00000 of")
            mount.fuse.release(lines.nodeid, handle)
            device.suspend()
            marked, written = bitmap.pages(), changed(mount.memory, before, *mount.rings) - asked
            assert written <= marked
            assert len(written) >= 5, "the file's content came into these"
            assert device.get_base(1) == SplitBase(mount.rings[1].device_used_index)
            device.set_dirty_log(None)
            device.resume()
            assert mount.read() == content, "the file that was opened before the first log"
            mount.memory.slice(mount.fuse._answer, 20_000)[:] = bytes(20_000)
