"""`mmlens` and `python -m mmlens`: Ctrl-C is one line and exit code 130, also during imports."""

import sys

from mmlens.utils.interrupts import noting_interrupts


def main() -> None:
    """Run the command line and exit; see `mmlens.cli.app.main`."""
    with noting_interrupts() as interrupts:
        try:
            from mmlens.cli import main as run

            run(interrupts=interrupts)
        except (Exception, KeyboardInterrupt) as error:
            if not (interrupts.seen or isinstance(error, KeyboardInterrupt)):
                raise
            print("mmlens: interrupted", file=sys.stderr)
            sys.exit(130)


if __name__ == "__main__":
    main()
