"""Run the CPU kernel tests on an extension built with AddressSanitizer and UBSan: `make sanitize`.

A script rather than `python -m pytest`: that would put the working directory, with the sources of fastdensity but
no extension, in front of the installed package.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

TESTS = [
    *("test_rows.py", "test_rules.py", "test_philox.py", "test_probe.py", "test_track.py", "test_boundary.py"),
    *("test_dual_chain.py", "test_dual_linear.py", "test_dual_norm.py", "test_dual_softmax.py"),
    *("test_dual_attention.py", "test_dual_attention_narrow.py", "test_dual_conv.py"),
]
# what takes long under the sanitizers and touches no line of C++ that shorter tests do not: two gigabytes of elements,
# compilers and graphs, derivatives and references made of torch's operators, a measurement of memory
SKIPPED = (
    "two_to_the_31", "compile", "opcheck", "in_graphs", "inductor", "backward", "derivatives", "gradcheck", "nested",
    "vmap", "reference_is", "memory_stays",
)  # fmt: skip

if __name__ == "__main__":
    import fastdensity._native as extension

    folder = Path(__file__).parent
    if folder.parent in Path(extension.__file__).parents and "sanitize" not in extension.__file__:
        sys.exit(f"this is not the sanitized build: {extension.__file__}")
    skipped = f"not ({' or '.join(SKIPPED)})"
    sys.exit(pytest.main(["-x", "-k", skipped, *(str(folder / name) for name in TESTS)]))
