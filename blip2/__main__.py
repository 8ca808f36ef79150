"""`python -m blip2`: the command line."""

from blip2.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
