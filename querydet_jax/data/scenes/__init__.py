"""Generated aerial scenes: a data set that needs no download."""
