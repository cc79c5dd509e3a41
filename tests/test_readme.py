"""The README's second example; the first takes a kernel, and runs there."""

from vdpabridge.drivers.sim import Sim

from .support.readme import examples


def test_saving_state():
    names = {}
    exec(examples()[1], names)
    with Sim.fs(timeout_s=5) as device:
        device.accept_features(1 << 32)
        assert names["save"](device).startswith(b"vdpa-sim")
