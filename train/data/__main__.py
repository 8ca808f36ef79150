"""python -m train.data check FOLDER, prepare KIND ..., and bench."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """The commands: check, prepare and bench."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments[:1] == ["check"]:
        from train.data import check

        return check.main(arguments[1:])
    if arguments[:1] == ["prepare"]:
        from train.data import prepare

        return prepare.main(arguments[1:])
    if arguments[:1] == ["bench"]:
        from train.data import bench

        return bench.main(arguments[1:])
    print("python -m train.data check -h, prepare -h or bench -h")
    return 0 if arguments[:1] in (["-h"], ["--help"]) else 2


if __name__ == "__main__":
    sys.exit(main())
