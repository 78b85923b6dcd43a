"""`python -m fastdensity` and the console script `fastdensity`."""

from __future__ import annotations

import importlib.util
import sys

NEEDED = {"typer": "typer", "rich": "rich", "safetensors": "safetensors", "matplotlib": "matplotlib", "PIL": "pillow"}


def main() -> None:
    """Runs the command line; where its packages are missing, says which extra brings them."""
    missing = [package for module, package in NEEDED.items() if importlib.util.find_spec(module) is None]
    if missing:
        sys.exit(f"fastdensity: the command line needs {', '.join(missing)}: pip install 'fastdensity[cli]'")
    try:
        from fastdensity import cli

        sys.exit(cli.main())
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
