"""`vdpabridge uapi` and `vdpabridge ioctl`: somebody's header, and its requests by name, without a compiler."""

import json
import struct
from errno import ENOTTY

import pytest

from vdpabridge.cli import main
from vdpabridge.drivers.vhost_vdpa import node as node_module
from vdpabridge.drivers.vhost_vdpa.node import Node

from ..support.fake_kernel import FakeKernel
from ..uapi.test_header import PROPOSAL, written

NODE = "/dev/vhost-vdpa-0"
TRANSFER = 0xC020AFE4


class Patched(FakeKernel):
    """A kernel with the proposal: it answers with twice the offset."""

    def ioctl(self, fd, request, argument):
        if request == TRANSFER:
            struct.pack_into("=Q", argument, 0, struct.unpack_from("=Q", argument)[0] * 2)
            return 7
        return super().ioctl(fd, request, argument)


@pytest.fixture
def kernel(monkeypatch):
    """What `vdpabridge ioctl` talks to."""
    fake = Patched()
    opening = Node.open
    monkeypatch.setattr(node_module.Node, "open", lambda path, timeout_s=None: opening(path, fake, timeout_s=timeout_s))
    return fake


def run(capsys, *words):
    code = main(list(words))
    said = capsys.readouterr()
    return code, said.out, said.err


def test_a_header_is_listed(tmp_path, capsys):
    path = written(tmp_path, PROPOSAL + "\n#define BAD _IOW(0xAF, 1, struct nowhere)\n")
    code, out, err = run(capsys, "uapi", path)
    assert (code, err) == (0, "")
    assert "0xc020afe4  WR         struct state_in  32     STATE_TRANSFER\n" in out
    assert "odd: 9 bytes: 0 uint8_t a, 1 uint64_t b\n" in out
    assert out.endswith("not evaluated: BAD: the size of struct nowhere is not known\n")


def test_two_headers_are_compared(tmp_path, capsys):
    before = written(tmp_path, PROPOSAL)
    after = written(tmp_path, PROPOSAL.replace("0xE5", "0xE7"), "b.h")
    code, out, _ = run(capsys, "uapi", before, "--diff", after)
    assert (code, out) == (
        0,
        "! request STATE_DONE: 0x0000afe5 without argument -> 0x0000afe7 without argument\n",
    )
    code, out, _ = run(capsys, "-j", "uapi", before, "--diff", after)
    assert json.loads(out)["differences"][0]["name"] == "STATE_DONE"


def test_requests_that_are_known(kernel, capsys):
    code, out, err = run(
        capsys, "ioctl", NODE, "VHOST_VDPA_GET_DEVICE_ID", "VHOST_SET_OWNER", "VHOST_GET_VRING_BASE", "index=1"
    )
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        "VHOST_VDPA_GET_DEVICE_ID: 0 value=2",
        "VHOST_SET_OWNER: 0",
        "VHOST_GET_VRING_BASE: 0 index=1 num=0",
    ]
    assert kernel.log == ["VHOST_VDPA_GET_DEVICE_ID", "VHOST_SET_OWNER", "VHOST_GET_VRING_BASE"]
    assert kernel.fd == -1, "the node is closed"


def test_a_request_that_only_the_header_knows(kernel, tmp_path, capsys):
    words = ("STATE_TRANSFER", "offset=0x10000", "direction=3", "name=abc")
    code, out, err = run(capsys, "-j", "ioctl", "--uapi", written(tmp_path, PROPOSAL), NODE, *words)
    assert (code, err) == (0, "")
    assert json.loads(out)["ioctl"] == [
        {
            "request": "STATE_TRANSFER",
            "returned": 7,
            "argument": {"offset": 0x20000, "direction": 3, "raw": "03000000", "parts": "00000000", "name": "abc"},
        }
    ]


def test_a_request_by_its_number(kernel, capsys):
    data = "0500000000000000" + "00" * 24
    code, out, _ = run(capsys, "ioctl", NODE, hex(TRANSFER), f"bytes={data}")
    assert (code, out) == (0, f"0xc020afe4: 7 bytes=0a00000000000000{'00' * 24}\n")


def test_the_first_that_fails_is_the_last(kernel, tmp_path, capsys):
    words = ("VHOST_VDPA_GET_STATUS", "STATE_DONE", "VHOST_SET_OWNER")
    code, out, err = run(capsys, "ioctl", "--uapi", written(tmp_path, PROPOSAL), NODE, *words)
    assert (code, out) == (1, "VHOST_VDPA_GET_STATUS: 0 value=0\n")
    assert "STATE_DONE: ENOTTY" in err
    code, out, err = run(capsys, "-j", "ioctl", "--uapi", written(tmp_path, PROPOSAL), NODE, *words)
    assert [each["request"] for each in json.loads(out)["ioctl"]] == ["VHOST_VDPA_GET_STATUS"]
    assert json.loads(err)["error"]["errno"] == ENOTTY


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["index=1"], "comes before any request"),
        (["VHOST_NOTHING"], "VHOST_NOTHING is not here"),
        (["VHOST_GET_VRING_BASE", "queue=1"], "its argument has no queue (it has index, num)"),
        (["VHOST_GET_VRING_BASE", "index=x"], "index=x is not a number"),
        (["VHOST_GET_VRING_BASE", "index=0x1ffffffff"], "does not fit into 4 bytes"),
        (["VHOST_SET_OWNER", "index=1"], "it has no argument"),
    ],
)
def test_what_makes_no_sense_opens_nothing(kernel, capsys, words, why):
    code, out, err = (
        run(capsys, "ioctl", NODE, "VHOST_VDPA_GET_STATUS", *words)
        if words != ["index=1"]
        else run(capsys, "ioctl", NODE, *words)
    )
    assert (code, out) == (2, "")
    assert why in err
    assert kernel.log == []
