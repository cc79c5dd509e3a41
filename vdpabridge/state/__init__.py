"""What a device needs to go on elsewhere, and the procedures that carry it there, written against the waist."""
