"""Time and memory on this machine."""
