"""Other tools on the same networks, data and seeds, each in its own environment; `contest` runs and judges all."""
