"""QEMU's command line for the test machine, and whether /dev/kvm works here."""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from .cache import cache_root, write_whole

__all__ = ["TESTED_DISK_BYTES", "Machine", "accelerator"]

QEMU = "qemu-system-x86_64"
#: A disk that the guest reaches through its IOMMU, as vp_vdpa needs it; the guest finds it by this serial number.
TESTED_DISK, TESTED_DISK_BYTES = "tested", 16 << 20
#: A guest on working KVM reaches its first process in a second or two; one that hangs never does.
KVM_PROBE_S = 10


@dataclass(frozen=True)
class Machine:
    """What to boot. Paths are files of the host; sockets are ones the runner listens on.

    It has an emulated IOMMU that snoops: vhost-vdpa accepts no other for a device that does DMA by itself. Only the
    tested disk is behind it.
    """

    kernel: Path
    root: Path
    payload: Path
    tested_disk: Path
    console: Path
    output_socket: Path
    status_socket: Path
    memory_mib: int = 1024
    cpus: int = 2
    kernel_arguments: str = ""

    def command(self, accel: str) -> list[str]:
        """The whole command line. The root image is shared: what the guest writes goes to a temporary overlay."""
        append = (
            "console=ttyS0 root=/dev/vda rw init=/init panic=-1 oops=panic hung_task_panic=1 intel_iommu=on "
            + self.kernel_arguments
        )
        return [
            *(QEMU, "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-machine", "q35"),
            *("-device", "intel-iommu,snoop-control=on,intremap=off"),
            *("-accel", accel, "-cpu", "max", "-smp", str(self.cpus), "-m", str(self.memory_mib)),
            *("-kernel", str(self.kernel), "-append", append),
            *("-drive", f"file={self.root},format=raw,if=none,id=root,snapshot=on,cache=unsafe"),
            *("-device", "virtio-blk-pci,drive=root"),
            *("-drive", f"file={self.payload},format=raw,if=none,id=payload,readonly=on"),
            *("-device", "virtio-blk-pci,drive=payload"),
            *("-drive", f"file={self.tested_disk},format=raw,if=none,id=tested,cache=unsafe"),
            "-device",
            f"virtio-blk-pci,drive=tested,serial={TESTED_DISK},disable-legacy=on,iommu_platform=on,num-queues=2",
            *("-chardev", f"file,id=console,path={self.console}", "-serial", "chardev:console"),
            *("-device", "virtio-serial-pci,max_ports=4"),
            *("-chardev", f"socket,id=output,path={self.output_socket}"),
            *("-device", "virtserialport,chardev=output,nr=1,name=output"),
            *("-chardev", f"socket,id=status,path={self.status_socket}"),
            *("-device", "virtserialport,chardev=status,nr=2,name=status"),
        ]


def accelerator(kernel: Path) -> str:
    """The ``-accel`` value to use: KVM if a guest was seen to boot on it since this host started, otherwise emulation.

    It proves nothing that /dev/kvm opens, or even that a virtual machine can be created on it: on some hosts every
    guest then hangs silently.
    """
    emulation = "tcg,thread=multi"
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return emulation
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    verdict = cache_root() / f"kvm-{boot_id}"
    known = verdict.read_text() if verdict.exists() else ""
    if known not in ("kvm", emulation):
        known = "kvm" if _boots_on_kvm(kernel) else emulation
        # if it cannot be kept, the next run finds it out again
        with contextlib.suppress(OSError):
            write_whole(verdict, known)
    return known


def _boots_on_kvm(kernel: Path) -> bool:
    """Whether ``kernel`` boots until it misses its root file system, and QEMU then ends, in time."""
    with tempfile.TemporaryDirectory() as scratch:
        console = Path(scratch) / "console"
        words = [QEMU, "-nodefaults", "-no-reboot", "-display", "none", "-accel", "kvm", "-cpu", "max", "-m", "256"]
        words += ["-kernel", str(kernel), "-append", "console=ttyS0 panic=-1"]
        words += ["-chardev", f"file,id=console,path={console}", "-serial", "chardev:console"]
        try:
            subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, timeout=KVM_PROBE_S, check=False)
        except subprocess.TimeoutExpired:
            return False
        return console.exists() and b"Kernel panic" in console.read_bytes()
