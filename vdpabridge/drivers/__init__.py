"""What implements `vdpabridge.device.Device`: one module or folder for each transport."""
