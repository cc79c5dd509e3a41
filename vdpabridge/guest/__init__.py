"""Guest drivers in miniature: real I/O on a device under test, every byte of it checked."""
