"""A Linux guest under QEMU, in front of our exporter: disks, file systems, reconnection, reset, live migration."""

import re
import signal
import time

import pytest

from ..support.machine import end
from ..support.unlogged import register
from ..support.waiting import wait_until


def blk(lab, name="blk.sock", options=""):
    return ["-chardev", f"socket,id=blk,path={lab.path(name)}{options}", "-device", "vhost-user-blk-pci,chardev=blk"]


def fs(lab, name="fs.sock"):
    return ["-chardev", f"socket,id=fs,path={lab.path(name)}", "-device", "vhost-user-fs-pci,chardev=fs,tag=share"]


MAKE_FS = "mke2fs -F /dev/vda >/dev/null && mount -t ext4 /dev/vda /mnt"
WRITE = (
    "dd if=/dev/urandom of=/tmp/r bs=64k count=16 2>/dev/null && cp /tmp/r /mnt/r && md5sum </mnt/r >/mnt/sum && sync"
)
CHECK = '[ "$(md5sum </mnt/r)" = "$(cat /mnt/sum)" ]'


def test_a_file_system_on_a_simulated_disk(lab):
    lab.serve("sim:blk,size=32M,queues=2", "blk.sock")
    guest = lab.guest("guest", *blk(lab)).boot()
    guest.run(MAKE_FS)
    guest.run(WRITE)
    guest.run("umount /mnt && echo 3 >/proc/sys/vm/drop_caches && mount -t ext4 /dev/vda /mnt")
    guest.run(CHECK)
    guest.run("umount /mnt")
    assert re.fullmatch(
        r"vdpabridge: \S+ info: sim:blk is served at .*\nvdpabridge: \S+ info: front-end came: process \d+\n",
        lab.log("blk.sock"),
    ), lab.log("blk.sock")


def test_a_guest_that_resets_finds_its_disk_as_it_was(lab):
    lab.serve("sim:blk,size=32M", "blk.sock", "--trace")
    guest = lab.guest("guest", *blk(lab), reboot=True).boot()
    guest.run(f"{MAKE_FS} && {WRITE} && umount /mnt")
    guest.type("reboot -f")
    guest.boot()
    guest.run(f"mount -t ext4 /dev/vda /mnt && {CHECK}")
    assert "RESET_DEVICE" in lab.log("blk.sock")


def test_a_back_end_that_dies_under_load_and_comes_back_loses_no_request(lab):
    """Killed in the middle; QEMU hands the in-flight region to the next process, which answers what the first took."""
    disk = lab.work / "disk"
    with disk.open("wb") as file:
        file.truncate(64 << 20)
    device = f"sim:blk,file={disk}"
    server = lab.serve(device, "blk.sock")
    guest = lab.guest("guest", *blk(lab, options=",reconnect-ms=50")).boot()
    guest.run(MAKE_FS)
    guest.type(
        "i=0; while [ $i -lt 300 ]; do i=$((i+1)); dd if=/dev/urandom of=/mnt/f$i bs=4k count=4 conv=fsync 2>/dev/null"
        " || echo write failed; md5sum </mnt/f$i >/mnt/s$i; done; echo all written"
    )
    for _ in range(3):
        time.sleep(0.4)
        end(server, signal.SIGKILL)
        server = lab.serve(device, "blk.sock")
    assert "failed" not in guest.expect(r"((?:.|\n)*)all written\n", 60)[1]
    guest.run("umount /mnt && mount -t ext4 /dev/vda /mnt")
    guest.run('i=0; while [ $i -lt 300 ]; do i=$((i+1)); [ "$(md5sum </mnt/f$i)" = "$(cat /mnt/s$i)" ] || exit 1; done')


def test_a_simulated_file_system(lab):
    lab.serve("sim:fs,files=50", "fs.sock")
    guest = lab.guest("guest", *fs(lab)).boot()
    guest.run("mount -t virtiofs share /mnt")
    assert guest.run("ls -1 /mnt") == "README\nlines\nmany\n"
    assert guest.run("ls /mnt/many | wc -l").strip() == "50"
    assert guest.run("cat /mnt/many/00042") == "this is file 42\n"
    assert guest.run("tail -n 1 /mnt/lines") == "line 01999 of the file called lines\n"
    assert guest.run("touch /mnt/new 2>&1 || true").strip().endswith("Read-only file system")
    guest.run("umount /mnt")


LINE_BYTES = 36
READ_LINES = (
    ": >/tmp/read; exec 4</mnt/many/00009; (exec 3</mnt/lines; while dd bs=36 count=1 <&3 >>/tmp/read 2>>/tmp/errors; do"
    " usleep 20000; done) &"
)


def reading_guest(lab, name, *devices):
    """A guest that holds two files open, and reads a line after the other of one of them."""
    guest = lab.guest(name, *devices).boot()
    guest.run("mount -t virtiofs share /mnt && ls /mnt/many >/dev/null")
    guest.run(READ_LINES)
    goes_on(guest)
    return guest


def lines_read(guest):
    return int(guest.run("stat -c %s /tmp/read")) // LINE_BYTES


def goes_on(guest):
    """See that ``guest`` reads on, what it ought to: the file that it opened long ago has gone on line by line."""
    # what is typed before a migration has come to its end is lost
    wait_until(lambda: guest.status() == "running")
    before = lines_read(guest)
    deadline = time.monotonic() + 20
    while lines_read(guest) < before + 3:
        assert time.monotonic() < deadline, guest.run("cat /tmp/errors; cat /tmp/read")
        time.sleep(0.02)
    guest.run("cmp -n $(stat -c %s /tmp/read) /tmp/read /mnt/lines")
    assert guest.run("cat /proc/self/fd/4").strip() == "this is file 9"


READ_ON = "while true; do echo 3 >/proc/sys/vm/drop_caches; md5sum </mnt/big >>/tmp/sums; done &"


@pytest.mark.parametrize("kind", ["sim", "unlogged"])
def test_live_migration_while_a_disk_is_read(lab, kind):
    """What the disk writes into the guest's memory is in the dirty log, or the destination's memory would be wrong.

    For a disk that keeps no log itself, by shadow rings.
    """
    disk = lab.work / "disk"
    with disk.open("wb") as file:
        file.truncate(64 << 20)
    register(lab.work)
    device = {"sim": f"sim:blk,file={disk}", "unlogged": f"unlogged:{disk}"}[kind]
    lab.serve(device, "a.sock")
    lab.serve(device, "b.sock")
    source = lab.guest("source", *blk(lab, "a.sock")).boot()
    source.run(f"{MAKE_FS} && dd if=/dev/urandom of=/mnt/big bs=1M count=24 2>/dev/null && sync")
    right = source.run("md5sum </mnt/big")
    source.run("mount -o remount,ro /mnt && : >/tmp/sums")
    source.run(READ_ON)
    wait_until(lambda: source.run("wc -l </tmp/sums").strip() not in ("", "0"))
    destination = lab.guest("destination", *blk(lab, "b.sock"), incoming=f"unix:{lab.path('migration')}")
    prepare(source)
    assert source.migrate(f"unix:{lab.path('migration')}")["status"] == "completed"
    wait_until(lambda: destination.status() == "running")
    before = int(destination.run("wc -l </tmp/sums"))
    wait_until(lambda: int(destination.run("wc -l </tmp/sums")) > before + 1)
    assert destination.run("sort -u /tmp/sums") == right
    assert "SET_LOG_BASE" not in lab.log("a.sock"), "no word of it: it was not refused"


RETURN_PATH = [{"capability": "return-path", "state": True}]


def prepare(guest):
    """Have the source wait for the destination's word: without that, a failed load is a success to QEMU."""
    guest.monitor("migrate-set-capabilities", capabilities=RETURN_PATH)


def start_back_end(lab, kind, name, *options):
    """A file system's back-end at ``name``: ours, or virtiofsd with our exporter and driver in between."""
    if kind == "sim":
        return [lab.serve("sim:fs", name)]
    if kind == "unlogged":
        register(lab.work)
        return [lab.serve("unlogged:fs", name)]
    shared = lab.shared()
    if not (shared / "many").exists():
        (shared / "many").mkdir()
        (shared / "lines").write_text("".join(f"line {number:05} of the file called lines\n" for number in range(2000)))
        for number in range(10):
            (shared / "many" / f"{number:05}").write_text(f"this is file {number}\n")
    if kind == "virtiofsd":
        return [lab.virtiofsd(shared, name, *options)]
    daemon = lab.virtiofsd(shared, f"{name}.real", *options)
    return [daemon, lab.serve(f"vhost-user:{lab.path(name)}.real,id=fs", name)]


KINDS = ("sim", "unlogged", "proxy", "virtiofsd")


@pytest.mark.parametrize("kind", KINDS)
def test_live_migration(lab, kind):
    """The guest goes on reading the file that it holds open, from the next line on; the source's back-end is gone."""
    back_ends = start_back_end(lab, kind, "a.sock")
    start_back_end(lab, kind, "b.sock")
    source = reading_guest(lab, "source", *fs(lab, "a.sock"))
    destination = lab.guest("destination", *fs(lab, "b.sock"), incoming=f"unix:{lab.path('migration')}")
    prepare(source)
    facts = source.migrate(f"unix:{lab.path('migration')}")
    assert facts["status"] == "completed", facts
    for process in back_ends:
        end(process)
    goes_on(destination)
    assert destination.status() == "running"


@pytest.mark.parametrize("kind", KINDS)
def test_migration_to_a_file_and_back(lab, kind):
    start_back_end(lab, kind, "a.sock")
    source = reading_guest(lab, "source", *fs(lab, "a.sock"))
    assert source.migrate(f"file:{lab.path('state')}")["status"] == "completed"
    for name in ("b", "c"):
        start_back_end(lab, kind, f"{name}.sock")
        restored = lab.guest(name, *fs(lab, f"{name}.sock"), incoming=f"file:{lab.path('state')}")
        goes_on(restored)


@pytest.mark.parametrize("kind", KINDS)
def test_a_migration_that_is_cancelled_leaves_the_source_running(lab, kind):
    start_back_end(lab, kind, "a.sock")
    start_back_end(lab, kind, "b.sock")
    source = reading_guest(lab, "source", *fs(lab, "a.sock"))
    lab.guest("destination", *fs(lab, "b.sock"), incoming=f"unix:{lab.path('migration')}")
    source.monitor("migrate-set-parameters", max_bandwidth=1 << 20)
    source.monitor("migrate", uri=f"unix:{lab.path('migration')}")
    source.migrated(("active",))
    goes_on(source)
    source.monitor("migrate_cancel")
    assert source.migrated()["status"] == "cancelled"
    goes_on(source)
    assert source.status() == "running"


REFUSALS = {
    "sim": "many/00009",
    # the destination's virtiofsd may not open files by handle
    "proxy": "CHECK_DEVICE_STATE",
}


@pytest.mark.parametrize("kind", REFUSALS)
def test_a_destination_that_refuses_the_state_leaves_the_source_running(lab, kind):
    if kind == "sim":
        start_back_end(lab, kind, "a.sock")
        lab.serve("sim:fs,files=5", "b.sock")
    else:
        start_back_end(lab, kind, "a.sock", "--migration-mode", "file-handles")
        start_back_end(lab, kind, "b.sock")
    source = reading_guest(lab, "source", *fs(lab, "a.sock"))
    lab.guest("destination", *fs(lab, "b.sock"), incoming=f"unix:{lab.path('migration')}")
    prepare(source)
    assert source.migrate(f"unix:{lab.path('migration')}")["status"] == "failed"
    assert REFUSALS[kind] in lab.log("b.sock")
    goes_on(source)
    assert source.status() == "running"
