"""Pure tensor functions of RLHF: they know no process groups and no devices."""
