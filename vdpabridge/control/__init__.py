"""A socket beside the device: clients ask the process that owns the device, by JSON-RPC."""
