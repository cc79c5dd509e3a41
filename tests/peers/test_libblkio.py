"""A front-end of another family: libblkio, by which qemu-io and qemu-img drive our exporter without a guest."""

import json

import pytest


def disk(lab):
    return f"driver=virtio-blk-vhost-user,path={lab.path('blk.sock')},cache.direct=on"


def test_reading_and_writing(lab):
    lab.serve("sim:blk,size=32M", "blk.sock")
    commands = ["write -P 0xab 1M 64k", "read -P 0xab 1M 64k", "read -P 0 0 1M", "flush"]
    lab.tool("qemu-io", "--image-opts", disk(lab), *(word for each in commands for word in ("-c", each)))
    # another front-end, later: the disk is as the first has left it
    lab.tool("qemu-io", "--image-opts", disk(lab), "-c", "read -P 0xab 1M 64k")
    lab.tool("qemu-img", "convert", "--image-opts", disk(lab), "-O", "raw", lab.path("copy"))
    with open(lab.path("copy"), "rb") as copy:
        content = copy.read()
    assert content == bytes(1 << 20) + b"\xab" * 65536 + bytes((32 << 20) - (1 << 20) - 65536)


def test_facts(lab):
    lab.serve("sim:blk,size=32M", "blk.sock")
    facts = json.loads(lab.tool("qemu-img", "info", "--output=json", "--image-opts", disk(lab)))
    assert facts["virtual-size"] == 32 << 20


def test_beyond_the_end(lab):
    lab.serve("sim:blk,size=1M", "blk.sock")
    with pytest.raises(AssertionError):
        lab.tool("qemu-io", "--image-opts", disk(lab), "-c", "read 1M 512")


def test_many_requests_at_a_time(lab):
    lab.serve("sim:blk,size=32M", "blk.sock")
    lab.tool("qemu-img", "bench", "-c", "2000", "-d", "32", "-w", "--image-opts", disk(lab))
