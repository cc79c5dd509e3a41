"""What this package asks of Linux, and the standard library does not give: one small module for each thing."""
