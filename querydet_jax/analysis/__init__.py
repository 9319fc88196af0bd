"""What a data set asks of a detector: `querydet report`. No image is read."""
