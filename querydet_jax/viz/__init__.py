"""Pictures, plots and text tables from plain arrays. Nothing here runs a detector."""
