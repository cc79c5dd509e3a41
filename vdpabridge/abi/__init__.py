"""Wire and kernel formats: numbers, structures, packing. No I/O and no policy.

Names are the C headers' own, so that they can be searched for; every number and offset is compared with what a C
compiler makes of the kernel's headers (tests/abi/test_headers.py).
"""
