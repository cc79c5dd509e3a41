"""The state image: written, read, verified, compared with a device, described."""
