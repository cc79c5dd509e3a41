"""What a device needs to continue elsewhere, and the procedures that carry it there, written against the waist."""
