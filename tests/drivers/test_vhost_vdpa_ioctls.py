"""The driver's requests: one row each, and one of which only the number is known."""

import ast
from errno import ENOTTY, errorcode
from pathlib import Path

import pytest

from vdpabridge.abi.vhost import BACKEND_FEATURE_NAMES, VhostIoctl as Ioctl
from vdpabridge.drivers import vhost_vdpa
from vdpabridge.drivers.vhost_vdpa.ioctls import ANY, ROWS
from vdpabridge.drivers.vhost_vdpa.node import Node
from vdpabridge.errors import ENOTSUPP, KernelError

from ..support.fake_kernel import FakeKernel

NODE = "/dev/vhost-vdpa-0"
UNKNOWN = 0x4010AFF0


def used():
    """The requests that the driver's own code names."""
    folder = Path(vhost_vdpa.__file__).parent
    trees = [ast.parse(path.read_text()) for path in folder.glob("*.py") if path.name != "ioctls.py"]
    return {
        Ioctl[node.attr]
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "Ioctl"
    }


def test_every_request_has_a_row_and_every_row_a_request():
    assert used() == set(ROWS)


def test_rows_are_in_the_order_of_the_numbers():
    every = list(Ioctl)
    assert list(ROWS) == sorted(ROWS, key=every.index)


@pytest.mark.parametrize("request_", ROWS, ids=lambda each: each.name)
def test_every_row_is_complete(request_):
    row = ROWS[request_]
    assert row.feature is None or row.feature in BACKEND_FEATURE_NAMES
    assert row.capability is None or row.feature is not None
    # who only asks changes nothing: no request that carries something in, or stops a queue
    assert not row.asks_only or (request_.name.split("_")[-1] != "BASE" and "_GET_" in request_.name)
    for code, (why, hint) in (ANY | row.meanings).items():
        assert code in errorcode or code == ENOTSUPP
        assert why
        assert hint


@pytest.mark.parametrize("request_", ROWS, ids=lambda each: each.name)
def test_what_it_carries_is_what_its_number_says(request_):
    """Source: include/uapi/asm-generic/ioctl.h, bits 16 to 29."""
    assert (request_ >> 16 & 0x3FFF) == (0 if request_.carries is None else request_.carries.size)


class Patched(FakeKernel):
    """A kernel with a request that nobody else has."""

    def ioctl(self, fd, request, argument):
        if request == UNKNOWN:
            argument[:] = bytes(reversed(argument))
            return 7
        return super().ioctl(fd, request, argument)


def test_a_request_of_which_only_the_number_is_known():
    buffer = bytearray(range(16))
    node = Node.open(NODE, Patched())
    assert node.call(UNKNOWN, buffer) == 7
    assert buffer == bytes(reversed(range(16)))
    node.close()


def test_a_request_that_the_kernel_does_not_know():
    node = Node.open(NODE, FakeKernel())
    with pytest.raises(KernelError, match="ioctl 0x4010aff0: ENOTTY: this kernel's vhost-vdpa does not know") as caught:
        node.call(UNKNOWN, bytearray(16))
    assert (caught.value.errno, caught.value.nothing_done) == (ENOTTY, True)
    node.close()
