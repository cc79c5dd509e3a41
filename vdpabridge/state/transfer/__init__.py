"""Device state on its way: pipes and files with limits, from and to a device."""
