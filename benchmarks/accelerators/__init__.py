"""Programs compiled for accelerators that are absent."""
