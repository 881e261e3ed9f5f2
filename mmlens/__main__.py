"""`python -m mmlens` is `mmlens`."""

from mmlens.cli import main

main()
