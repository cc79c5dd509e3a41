"""A socket beside the device: whoever owns the process that owns the device asks that process, by JSON-RPC."""
