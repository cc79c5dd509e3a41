"""Save, load and migrate, over any driver: all or nothing, and never both running or neither."""
