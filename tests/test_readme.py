"""The README's first example is a program that runs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


def test_first_example_runs():
    example = re.search(r"```python\n(.*?)```", README.read_text(), re.DOTALL).group(1)
    done = subprocess.run([sys.executable, "-c", example], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "torch.Size([16, 1, 8, 8]) tensor([" in done.stdout
    assert "nan" not in done.stdout


def test_files_it_names_exist():
    for path in re.findall(r"(?:docs/[\w./]+\.(?:md|png)|CONTRIBUTING\.md)", README.read_text()):
        assert (README.parent / path).exists(), path
