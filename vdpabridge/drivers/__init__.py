"""The drivers, which implement `vdpabridge.device.Device`: one module or folder for each transport."""
