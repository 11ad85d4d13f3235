"""Pure tensor functions of RLHF: same tensors in, same tensors out, no process groups and no devices."""
