"""``python -m batchops``: the configuration, then a self-test; exit status 1 where it fails."""

import argparse
import sys

from . import _self_test, show_config


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m batchops",
        description="Print what this installation can do and check that it does it right here.",
    )
    parser.add_argument("--config", action="store_true", help="print the configuration alone")
    parser.add_argument("--device", choices=_self_test.devices(), help="check this device alone")
    arguments = parser.parse_args()
    print(show_config())
    if arguments.config:
        return 0
    print("\nself-test against torch in float64")
    return 0 if _self_test.run(arguments.device) else 1


if __name__ == "__main__":
    sys.exit(main())
