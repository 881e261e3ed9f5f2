"""Write the text from which ROME's and MEMIT's key covariances are estimated.

    python benchmarks/corpus.py build/corpus.txt

The corpus is what the package itself says: its licence, and the docstrings of its modules, classes
and functions, one paragraph a line. It needs no download, and a release always makes the same one.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def docstrings(source: str) -> list[str]:
    """Return the docstrings of a Python file in the order in which they stand there."""
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, DOCUMENTED)]
    found = [(getattr(node, "lineno", 0), ast.get_docstring(node)) for node in nodes]
    return [text for _, text in sorted((line, text) for line, text in found if text)]


def paragraphs(text: str) -> list[str]:
    """Return the paragraphs of a text, each as one line."""
    return [" ".join(part.split()) for part in text.split("\n\n") if part.strip()]


def main(out: Path) -> None:
    """Write the corpus to `out`."""
    texts = [(ROOT / "LICENSE").read_text(encoding="utf-8")]
    for path in sorted((ROOT / "mmlens").rglob("*.py")):
        texts += docstrings(path.read_text(encoding="utf-8"))
    lines = [line for text in texts for line in paragraphs(text)]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{out}: {len(lines)} paragraphs, {sum(map(len, lines)):,} characters")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "build/corpus.txt"))
