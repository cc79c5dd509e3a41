"""The demonstration that ``make demo`` runs inside the test machine."""
