"""Pictures, plots and text tables from plain arrays."""
