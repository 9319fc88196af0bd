"""Report what a data set demands of a detector, from its annotations alone (``querydet report``)."""
