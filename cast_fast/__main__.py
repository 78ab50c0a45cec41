"""``python -m cast_fast …`` is ``cast-fast …``; torchrun starts it this way."""

from cast_fast.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
