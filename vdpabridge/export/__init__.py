"""What controls us: each exporter hands a `vdpabridge.device.Device` on to somebody outside of this process."""
