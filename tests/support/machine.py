"""Processes that the exporter's tests need: a guest under QEMU, back-ends, our own server."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
#: Emulation of a guest that boots in a second, on a machine that may be busy.
BOOT_S = 15
ANSWER_S = 30


class Gone(Exception):
    """A process ended that should not have."""


class Lines:
    """Lines that come out of a socket, one after the other."""

    def __init__(self, path):
        self.socket = connect(path)
        self.buffer = b""

    def read(self, pattern, timeout_s):
        """The match of ``pattern`` in what comes; it, and all before it, is taken away."""
        deadline = time.monotonic() + timeout_s
        compiled = re.compile(pattern, re.MULTILINE)
        while not (found := compiled.search(self.buffer.decode(errors="replace"))):
            left_s = deadline - time.monotonic()
            assert left_s > 0, (
                f"waited in vain for {pattern!r}; what came: {self.buffer.decode(errors='replace')[-2000:]}"
            )
            self.socket.settimeout(left_s)
            try:
                came = self.socket.recv(65536)
            except TimeoutError:
                continue
            if not came:
                raise Gone(f"the line is closed; last: {self.buffer.decode(errors='replace')[-2000:]}")
            self.buffer += came
        self.buffer = self.buffer[len(self.buffer.decode(errors="replace")[: found.end()].encode()) :]
        return found

    def close(self):
        self.socket.close()


class Guest:
    """A guest under QEMU with a shell on its serial line, and a monitor."""

    def __init__(self, name, work, process):
        self.name = name
        self.process = process
        self._serial = Lines(work / f"{name}.serial")
        self._monitor = Lines(work / f"{name}.qmp")
        self._monitor.read(r"QMP.*\n", ANSWER_S)
        self.monitor("qmp_capabilities")
        self._commands = 0

    def boot(self):
        """Wait for the shell."""
        self._serial.read("guest ready\r?\n", BOOT_S)
        return self

    def run(self, command, timeout_s=ANSWER_S):
        """What ``command`` prints; an AssertionError where it fails."""
        self._commands += 1
        marker = f"done-{self.name}-{self._commands}"
        self.type(f"{{ {command}\n}}; echo {marker}-$?-")
        found = self._serial.read(rf"((?:.|\n)*?){marker}-(\d+)-\r?\n", timeout_s)
        output = found[1].replace("\r", "")
        assert found[2] == "0", f"{command}: exit code {found[2]}: {output}"
        return output

    def type(self, line):
        """Send a line to the shell, and do not wait."""
        self._serial.socket.settimeout(ANSWER_S)
        self._serial.socket.sendall(line.encode() + b"\n")

    def expect(self, pattern, timeout_s=ANSWER_S):
        """Wait for something on the serial line."""
        return self._serial.read(pattern, timeout_s)

    def monitor(self, command, **arguments):
        """QMP: ``command``'s result."""
        words = {name.replace("_", "-"): value for name, value in arguments.items()}
        self._monitor.socket.sendall(json.dumps({"execute": command, "arguments": words}).encode() + b"\n")
        while True:
            answer = json.loads(self._monitor.read(r".*\n", ANSWER_S)[0])
            if "return" in answer:
                return answer["return"]
            assert "event" in answer, f"{command}: {answer}"

    def migrate(self, uri, *, until=("completed", "failed", "cancelled")):
        """Migrate to ``uri`` and wait; the facts about it."""
        self.monitor("migrate", uri=uri)
        return self.migrated(until)

    def migrated(self, until=("completed", "failed", "cancelled"), timeout_s=ANSWER_S):
        """Wait until the migration is in one of these states."""
        deadline = time.monotonic() + timeout_s
        while True:
            facts = self.monitor("query-migrate")
            if facts.get("status") in until:
                return facts
            assert time.monotonic() < deadline, f"a migration that does not end: {facts}"
            time.sleep(0.01)

    def status(self):
        """``running``, ``paused``, ``postmigrate`` …"""
        return self.monitor("query-status")["status"]

    def close(self):
        """End QEMU."""
        self._serial.close()
        self._monitor.close()
        end(self.process)


class Lab:
    """Starts processes in a directory of their own, and ends them all."""

    def __init__(self, work, peers, kernel, initramfs):
        self.work = work
        self.peers = peers
        self._kernel = kernel
        self._initramfs = initramfs
        self._ends = []
        self._shared = None

    def guest(self, name, *devices, incoming=None, memory_mib=128, reboot=False):
        """A guest with ``devices``, words for QEMU's command line."""
        work = self.work
        words = ["-nodefaults", "-no-user-config", "-display", "none", *([] if reboot else ["-no-reboot"])]
        words += ["-machine", "q35,memory-backend=mem", "-m", str(memory_mib)]
        words += ["-object", f"memory-backend-memfd,id=mem,size={memory_mib}M,share=on"]
        words += ["-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "1"]
        words += ["-kernel", str(self._kernel), "-initrd", str(self._initramfs)]
        words += ["-append", "console=ttyS0 panic=-1 quiet"]
        for what, ident in (("serial", "-serial"), ("qmp", "-mon")):
            socket_options = f"path={work}/{name}.{what},server=on,wait=off"
            words += ["-chardev", f"socket,id={what},{socket_options},logfile={work}/{name}.{what}.log"]
            words += [ident, f"chardev:{what}" if what == "serial" else "chardev=qmp,mode=control"]
        words += [*devices, *(["-incoming", incoming] if incoming else [])]
        process = self.start(self.peers.command("qemu-system-x86_64", *words), f"{name}.log")
        try:
            guest = Guest(name, work, process)
        except (AssertionError, Gone, OSError) as error:
            raise AssertionError(f"{name}: {error}: {self.log(name)}") from error
        self._ends.append(guest.close)
        return guest

    def serve(self, device, socket_name, *options):
        """Our exporter, as a process."""
        path = self.work / socket_name
        words = [sys.executable, "-m", "vdpabridge", "serve", device, "--socket-path", str(path), *options]
        # a test may put a driver into the second one
        paths = ":".join(map(str, filter(None, (ROOT, self.work, os.environ.get("PYTHONPATH")))))
        process = self.start(words, f"{socket_name}.log", cwd=ROOT, env={**os.environ, "PYTHONPATH": paths})
        wait_for_socket(path, process, self)
        return process

    def virtiofsd(self, shared, socket_name, *options):
        """virtiofsd: serves one front-end and ends."""
        path = self.work / socket_name
        words = ["--socket-path", str(path), "--shared-dir", str(shared), "--sandbox", "none", "--cache", "never"]
        process = self.start(self.peers.command("virtiofsd", *words, *options), f"{socket_name}.log")
        wait_for_socket(path, process, self)
        return process

    def tool(self, program, *arguments):
        """The output of one of the image's programs, run to its end."""
        words = self.peers.command(program, *arguments)
        done = subprocess.run(
            words, env=self.peers.environment, capture_output=True, text=True, timeout=120, check=False, cwd=self.work
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def shared(self):
        """A directory for file servers to share, on a file system that has file handles (an overlay has none)."""
        if self._shared is None:
            self._shared = Path(tempfile.mkdtemp(prefix="vb-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None))
            self._ends.append(lambda: shutil.rmtree(self._shared))
        return self._shared

    def start(self, words, log, *, cwd=None, env=None):
        """A process whose output goes to file ``log``; ended with the lab."""
        with open(self.work / log, "ab") as output:
            process = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd=cwd or self.work,
                env=env or self.peers.environment,
            )
        self._ends.append(lambda: end(process))
        return process

    def log(self, name):
        """What a process has said."""
        path = self.work / f"{name}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def logs(self):
        """What all of them have said: what a failing test is looked into with."""
        texts = [(path.name, path.read_text(errors="replace")[-4000:]) for path in sorted(self.work.glob("*.log"))]
        return "\n".join(f"--- {name}\n{text}" for name, text in texts)

    def path(self, name):
        return str(self.work / name)

    def close(self):
        while self._ends:
            self._ends.pop()()


@contextmanager
def lab_in(work, peers, kernel, initramfs):
    lab = Lab(work, peers, kernel, initramfs)
    try:
        yield lab
    finally:
        lab.close()


def connect(path, timeout_s=20):
    """A connection to the socket at ``path``, as soon as somebody listens there."""
    deadline = time.monotonic() + timeout_s
    while True:
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.connect(str(path))
            return connection
        except OSError:
            connection.close()
            assert time.monotonic() < deadline, f"nobody listens at {path}"
            time.sleep(0.01)


def wait_for_socket(path, process, lab, timeout_s=20):
    """Wait until ``process`` listens at ``path``, without connecting: some peers serve one connection only."""
    deadline = time.monotonic() + timeout_s
    while f" {path}\n" not in Path("/proc/net/unix").read_text():
        assert process.poll() is None, f"{path.name}: ended with {process.returncode}: {lab.log(path.name)}"
        assert time.monotonic() < deadline, f"nobody listens at {path}: {lab.log(path.name)}"
        time.sleep(0.01)


def end(process, number=signal.SIGTERM):
    """End a process, and wait for it."""
    if process.poll() is None:
        process.send_signal(number)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
    process.wait()
