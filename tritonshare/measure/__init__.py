"""Measuring on this machine: what the device is, trials of plans, the tuner, performance targets."""
