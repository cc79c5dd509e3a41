"""What controls this process: each exporter offers a `vdpabridge.device.Device` to another process."""
