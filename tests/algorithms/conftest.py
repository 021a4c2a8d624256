from tests.algorithms.parts import tiny

__all__ = ["tiny"]
