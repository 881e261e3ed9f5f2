"""The command line: `mmlens demo`, `trace`, `contributions`, `knockout`, `sweep`, `verify` ...

One file per command; `app` puts them together, `errors` turns bad input into one line and exit
code 2. A command imports what takes seconds (torch, transformers) only after it has looked at its
arguments.
"""

from mmlens.cli.app import app, main

__all__ = ["app", "main"]
