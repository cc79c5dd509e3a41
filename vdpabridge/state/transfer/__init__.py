"""The transfer of device state: pipes and files with limits, from and to a device."""
