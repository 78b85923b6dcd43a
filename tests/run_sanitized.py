"""Run the CPU kernel tests on an extension built with AddressSanitizer and UBSan: `make sanitize`.

A script rather than `python -m pytest`: that would put the working directory, with the sources of fastdensity but
no extension, in front of the installed package.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

TESTS = ["test_rows.py", "test_rules.py", "test_philox.py", "test_boundary.py"]
# two gigabytes of elements take minutes under the sanitizers and touch no line that shorter rows do not
TOO_LARGE = "not two_to_the_31"

if __name__ == "__main__":
    import fastdensity._native as extension

    folder = Path(__file__).parent
    if folder.parent in Path(extension.__file__).parents and "sanitize" not in extension.__file__:
        sys.exit(f"this is not the sanitized build: {extension.__file__}")
    sys.exit(pytest.main(["-x", "-k", TOO_LARGE, *(str(folder / name) for name in TESTS)]))
