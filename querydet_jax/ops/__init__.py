"""Pure array functions of detection. Nothing here knows a module, a data set or a device."""
