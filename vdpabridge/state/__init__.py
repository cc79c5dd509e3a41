"""What a device needs to continue elsewhere, and the procedures that carry it there.

All of it is written against the waist (`vdpabridge.device`).
"""
