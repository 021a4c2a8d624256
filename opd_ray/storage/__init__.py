"""Bytes that outlive a call: packing for the object store, checkpoints, the run folder."""
