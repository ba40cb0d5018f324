"""``bmt-convert``, and ``python -m rewriter``."""

from __future__ import annotations

import sys


def main() -> int:
    """As ``rewriter.cli.main``; Ctrl-C while that is loaded is one line, too."""
    try:
        from rewriter.cli import main as convert
    except KeyboardInterrupt:
        print("\nbmt-convert: interrupted; nothing was written", file=sys.stderr)
        return 130  # as cli.INTERRUPTED
    return convert()


if __name__ == "__main__":
    sys.exit(main())
