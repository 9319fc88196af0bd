"""Images to detections: the compiled detector, and its export."""
