"""The program that management software starts for a shared folder, with a real virtiofsd behind it."""

import json
import os
import signal
import subprocess
import sys
from contextlib import ExitStack

import pytest

from vdpabridge.control.client import ControlClient
from vdpabridge.drivers.vhost_user import VhostUser

from ..cli.test_serve import ENVIRONMENT, is_served
from ..support.mount import Mount
from ..support.waiting import wait_until

PROGRAM = "import sys; from vdpabridge.cli import backend_programs; sys.exit(backend_programs.fs())"


@pytest.fixture
def virtiofsd(lab, tmp_path):
    """virtiofsd as one program, whatever it takes to run the lab's."""
    words = " ".join(f"'{word}'" for word in lab.peers.command("virtiofsd", "--sandbox", "none"))
    program = tmp_path / "virtiofsd"
    exports = "\n".join(f"export {name}='{value}'" for name, value in lab.peers.environment.items() if "'" not in value)
    program.write_text(f'#!/bin/sh\n{exports}\nexec {words} "$@"\n')
    program.chmod(0o755)
    return program


def test_a_folder_behind_our_proxy(lab, virtiofsd, tmp_path):
    shared = lab.shared()
    (shared / "README").write_text("These are the lines\n")
    path, control = lab.path("fs.sock"), lab.path("fs.control")
    words = ["--shared-dir", str(shared), "--socket-path", path, "--control", control, "--virtiofsd", str(virtiofsd)]
    command = [sys.executable, "-c", PROGRAM, *words, "--migration-mode", "find-paths"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, env=ENVIRONMENT) as process:
        try:
            wait_until(lambda: is_served(control) or process.poll() is not None)
            with (
                VhostUser.open(path, device_id=26, timeout_s=10) as device,
                ControlClient(control, timeout_s=10) as client,
                ExitStack() as stack,
            ):
                mount = Mount(stack, device)
                assert mount.read() == b"These"
                saved = client.ask("save", path=str(tmp_path / "image"))
                assert saved["state_bytes"] > 0
                assert mount.read() == b"These"
            process.send_signal(signal.SIGTERM)
            said = process.communicate(timeout=20)[1].decode()
        finally:
            process.kill()
    assert process.returncode == 0, said
    # the one behind it has ended too
    left = subprocess.run(["pgrep", "-f", f"shared-dir {shared}"], capture_output=True, text=True, check=False)
    assert left.stdout == ""


def test_a_virtiofsd_that_does_not_start(tmp_path):
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            PROGRAM,
            "--shared-dir",
            "/",
            "--socket-path",
            str(tmp_path / "s"),
            "--virtiofsd",
            "/bin/false",
        ],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        check=False,
    )
    assert done.returncode == 1
    assert "/bin/false: it has ended with 1" in done.stderr


def test_a_virtiofsd_that_is_not_there(tmp_path):
    words = ["--shared-dir", "/", "--socket-path", str(tmp_path / "s"), "--virtiofsd", str(tmp_path / "nothing")]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *words], capture_output=True, text=True, env=ENVIRONMENT, check=False
    )
    assert (done.returncode, done.stderr) == (
        1,
        f"vdpabridge-vhost-user-fs: {tmp_path}/nothing: start virtiofsd: No such file or directory\n",
    )


def test_an_end_while_virtiofsd_starts_leaves_nothing_behind(tmp_path):
    slow = tmp_path / "slow"
    slow.write_text(f"#!/bin/sh\necho $$ >{tmp_path}/pid\nexec sleep 60\n")
    slow.chmod(0o755)
    words = ["--shared-dir", "/", "--socket-path", str(tmp_path / "s"), "--virtiofsd", str(slow)]
    with subprocess.Popen([sys.executable, "-c", PROGRAM, *words], env=ENVIRONMENT) as process:
        wait_until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
        process.terminate()
        assert process.wait(20) == 0
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_what_it_can_do():
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, "--print-capabilities"], capture_output=True, env=ENVIRONMENT, check=True
    )
    assert json.loads(done.stdout) == {"type": "fs", "features": ["migrate-precopy", "separate-options"]}
