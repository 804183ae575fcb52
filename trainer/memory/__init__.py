"""What fits in the device's memory: blocks that are computed again in backward."""
