"""Pure array functions for detection, independent of modules, data sets and devices."""
