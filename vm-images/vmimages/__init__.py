"""Test machines for vdpabridge: kernels and a root file system built from Debian, and a runner for them.

Standard library only, so that it works before anything is installed:
``python3 -m vmimages --help`` with ``vm-images`` on the path, or the ``vm-images/run`` script.
"""
