"""Reads kernel headers at run time, without a compiler: requests, structures and constants of somebody's proposal."""
