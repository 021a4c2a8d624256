"""The package's own strings, for tests that hold documents to what the code says."""

import ast
import re

__all__ = ["GAP", "squeezed", "template"]

GAP = "…"


def template(node: ast.AST) -> str | None:
    """A string of the code with a gap for whatever is filled in; None for anything else."""
    match node:
        case ast.Constant(value=str(text)):
            return squeezed(text)
        case ast.JoinedStr(values=parts):
            return squeezed("".join(part.value if isinstance(part, ast.Constant) else GAP for part in parts))
    return None


def squeezed(text: str) -> str:
    """On one line, and no two gaps in a row."""
    return re.sub(rf"{GAP}(\s*{GAP})*", GAP, " ".join(text.split()))
