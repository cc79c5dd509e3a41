"""The udev files come with the package, whichever way it was installed. What they do is tested in tests/vm."""

import subprocess

from vdpabridge.bus import udev_files


def test_the_helper_is_a_shell_script_without_errors(tmp_path):
    path = tmp_path / "vdpa-node"
    path.write_text(udev_files.helper())
    subprocess.run(["sh", "-n", path], check=True)


def test_no_rule_waits_for_an_event_that_never_comes():
    rules = [line for line in udev_files.rules().splitlines() if line and not line.startswith("#")]
    assert rules
    assert not [line for line in rules if "vhost-vdpa-" in line]
