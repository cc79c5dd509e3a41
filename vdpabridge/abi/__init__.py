"""Wire and kernel formats: numbers, structures, packing. No I/O and no policy.

Names are those of the C headers, so that you can search for them. A test compares every number and offset with what a C
compiler makes of the kernel's headers (tests/abi/test_headers.py).
"""
