"""The one place that writes to the terminal."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout

from rich.console import Console

__all__ = ["console", "errors", "results_alone"]

# Prompts, paths and names are shown as they are: no markup, no emoji codes.
console = Console(markup=False, emoji=False, highlight=False)
"""Results, and nothing else: what a script reads."""
errors = Console(stderr=True, markup=False, emoji=False, highlight=False)
"""Everything on the way: the live view, notes and errors."""


@contextmanager
def results_alone() -> Iterator[None]:
    """Keep stdout for ``console``: what others print there meanwhile, as a reward or Ray, goes to stderr."""
    before, console._file = console._file, sys.stdout
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        console._file = before
