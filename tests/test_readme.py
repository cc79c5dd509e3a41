"""The README's second example; the first takes a kernel, and runs there."""

import re

import vdpabridge

from .support.disk_lab import lab
from .support.readme import examples


def test_saving_state(tmp_path, capsys):
    names = {}
    exec(examples()[1], names)
    with lab("sim") as (device, _, work):
        names["save"](device, str(tmp_path / "image"))
        work.finish()
    assert re.fullmatch(r"\d+ bytes of state, the guest waited \d\.\d{3} s for the suspend\n", capsys.readouterr().out)
    assert vdpabridge.inspect(tmp_path / "image")["device"] == "block"
