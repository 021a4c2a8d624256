"""Before a run: whether this machine has what it takes."""
