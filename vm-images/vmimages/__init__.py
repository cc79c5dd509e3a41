"""Test machines for vdpabridge: kernels and a root file system built from Debian, and a runner for them.

The command is ``vm-images/run``. Of Python's packages only ioctl-opt is needed here, to hand it to the guest.
"""
