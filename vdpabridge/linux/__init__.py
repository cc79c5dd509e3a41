"""What this package needs from Linux and the standard library does not give: one small module for each thing."""
