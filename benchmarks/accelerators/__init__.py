"""Programs compiled for accelerators that are not at hand."""
