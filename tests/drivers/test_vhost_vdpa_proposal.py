"""Somebody else's requests for device state: other numbers, other arguments, named in a TOML file."""

import os
import struct
from contextlib import contextmanager
from errno import EBADMSG, EOPNOTSUPP

import pytest

from vdpabridge.device import Capability, StateDirection
from vdpabridge.drivers.vhost_vdpa import VhostVdpa
from vdpabridge.drivers.vhost_vdpa.proposal import UAPI_VARIABLE, state_requests
from vdpabridge.drivers.vhost_vdpa.state_requests import OURS, RETURNED
from vdpabridge.errors import KernelError, UsageError, VdpaBridgeError

from ..support.fake_kernel import FakeKernel, Parent
from ..support.transitions import begin_state

NODE = "/dev/vhost-vdpa-0"
HEADER = """
#define VHOST_VIRTIO 0xAF
#define VHOST_BACKEND_F_THEIR_STATE 61
struct their_state { __u64 length; __u32 way; __s32 fd; };
enum { NAMELESS };
#define THEIR_SAVE 1
#define THEIR_LOAD 2
#define THEIR_TRANSFER _IOWR(VHOST_VIRTIO, 0xE8, struct their_state)
#define THEIR_CHECK _IOR(VHOST_VIRTIO, 0xE9, __u64)
#define THEIR_OPEN _IO(VHOST_VIRTIO, 0xEA)
#define THEIR_CANCEL _IO(VHOST_VIRTIO, 0xEB)
"""
PROPOSAL = """
header = "their.h"
feature = "VHOST_BACKEND_F_THEIR_STATE"

[save]
request = "THEIR_TRANSFER"
descriptor = "fd"
way = "THEIR_SAVE"
length = 0xFFFF
fd = -1

[load]
request = "THEIR_TRANSFER"
descriptor = "fd"
way = "THEIR_LOAD"
fd = -1

[check]
request = "THEIR_CHECK"

[cancel]
request = "THEIR_CANCEL"
"""
TRANSFER, CHECK, OPEN, CANCEL = 0xC010AFE8, 0x8008AFE9, 0xAFEA, 0xAFEB


def written(folder, proposal=PROPOSAL, header=HEADER):
    (folder / "their.h").write_text(header)
    (folder / "proposal.toml").write_text(proposal)
    return str(folder / "proposal.toml")


class Theirs(FakeKernel):
    """A kernel with their requests, and without ours."""

    def __init__(self):
        super().__init__(Parent(extra_backend_features=1 << 61))
        self.asked = []
        self.refuse_check = 0

    def vhost_set_backend_features(self, argument):
        self.accepted = struct.unpack("=Q", argument)[0]
        return super().vhost_set_backend_features(bytearray(struct.pack("=Q", self.accepted & ~(1 << 61))))

    def ioctl(self, fd, request, argument):
        if request not in (TRANSFER, CHECK, OPEN, CANCEL):
            return super().ioctl(fd, request, argument)
        self.asked.append((request, bytes(argument) if isinstance(argument, bytearray) else argument))
        if request == CHECK and self.refuse_check:
            raise OSError(self.refuse_check, os.strerror(self.refuse_check))
        if request in (TRANSFER, OPEN):
            self.state_fds.append(os.memfd_create("state", os.MFD_CLOEXEC))
            if request == OPEN:
                return self.state_fds[-1]
            struct.pack_into("=i", argument, 12, self.state_fds[-1])
        return 0


@contextmanager
def opened(path):
    kernel = Theirs()
    with VhostVdpa.open(NODE, system=kernel, timeout_s=5, state_requests=state_requests(path)) as device:
        yield kernel, device


def test_their_requests_are_made_with_their_arguments(tmp_path):
    with opened(written(tmp_path)) as (kernel, device):
        assert kernel.accepted >> 61 & 1
        assert Capability.DEVICE_STATE in device.capabilities
        with begin_state(device, StateDirection.SAVE) as file:
            assert file.fileno() == kernel.state_fds[0]
        device.check_state()
        begin_state(device, StateDirection.LOAD).close()
        device.abandon_state()
        assert kernel.asked == [
            (TRANSFER, struct.pack("=QIi", 0xFFFF, 1, -1)),
            (CHECK, bytes(8)),
            (TRANSFER, struct.pack("=QIi", 0, 2, -1)),
            (CANCEL, 0),
        ]


def test_a_descriptor_that_the_kernel_returns(tmp_path):
    proposal = PROPOSAL.split("[save]", maxsplit=1)[0] + "".join(
        f'[{name}]\nrequest = "{request}"\n'
        for name, request in (("save", "THEIR_OPEN"), ("load", "THEIR_OPEN"), ("check", "THEIR_CHECK"))
    )
    with opened(written(tmp_path, proposal)) as (kernel, device):
        with begin_state(device, StateDirection.SAVE) as file:
            assert file.fileno() == kernel.state_fds[0]
        # there is no request to cancel: the check ends it, whatever it answers
        kernel.refuse_check = EBADMSG
        device.abandon_state()
        assert [request for request, _ in kernel.asked] == [OPEN, CHECK]
        device.abandon_state()
        assert len(kernel.asked) == 2


def test_what_their_kernel_refuses_keeps_its_errno(tmp_path):
    with opened(written(tmp_path)) as (kernel, device):
        begin_state(device, StateDirection.LOAD).close()
        kernel.refuse_check = EOPNOTSUPP
        with pytest.raises(KernelError, match=hex(CHECK)) as caught:
            device.check_state()
        assert caught.value.errno == EOPNOTSUPP


def test_without_their_bit_there_is_no_state(tmp_path):
    kernel = FakeKernel(Parent(has_state=True))
    with VhostVdpa.open(NODE, system=kernel, state_requests=state_requests(written(tmp_path))) as device:
        assert Capability.DEVICE_STATE not in device.capabilities


def test_the_environment_says_it_for_all(tmp_path, monkeypatch):
    assert state_requests() is OURS
    monkeypatch.setenv(UAPI_VARIABLE, written(tmp_path))
    assert (state_requests().feature, state_requests().check.fd_offset) == (61, RETURNED)


WRONG = {
    "no TOML": ("= 5", "Invalid"),
    "nothing": ("", "it has no check, feature, header, load, save"),
    "a word of its own": (PROPOSAL + "[begin]\n", "it has begin, which means nothing here"),
    "a constant that there is not": (PROPOSAL.replace('"THEIR_SAVE"', '"MY_SAVE"'), "'MY_SAVE' is neither a number"),
    "a feature that is no bit": (PROPOSAL.replace('"VHOST_BACKEND_F_THEIR_STATE"', "64"), "feature 64 is not a bit"),
    "a descriptor that there is not": (PROPOSAL.replace('descriptor = "fd"', 'descriptor = "file"'), "has no file"),
    "a request without a name": (PROPOSAL.replace('request = "THEIR_CHECK"', ""), r"\[check\] has no request"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_file_that_is_wrong(tmp_path, case):
    text, why = WRONG[case]
    with pytest.raises(VdpaBridgeError, match=why):
        state_requests(written(tmp_path, text))


def test_requests_and_members_that_the_header_does_not_have(tmp_path):
    with pytest.raises(UsageError, match="THEIR_CHECK is neither in"):
        state_requests(written(tmp_path, header=HEADER.replace("#define THEIR_CHECK", "#define OTHER")))
    with pytest.raises(UsageError, match="its argument has no length"):
        state_requests(written(tmp_path, header=HEADER.replace("__u64 length", "__u64 size")))
    with pytest.raises(VdpaBridgeError, match="No such file"):
        state_requests(str(tmp_path / "nowhere.toml"))
