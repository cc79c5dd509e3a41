"""What both ends of a vhost-user socket have in common; the driver and the exporter are built on it."""
