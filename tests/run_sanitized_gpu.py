"""What `make gpu` runs under compute-sanitizer: every way through the CUDA row kernels, on few and small rows.

Memory is allocated tensor by tensor (PYTORCH_NO_CUDA_MEMORY_CACHING=1), so that an access beyond one is seen.
"""

from __future__ import annotations

import torch
from rows_cases import Problem, assert_as_good_as_eager, random_problem

from fastdensity._backend import use
from fastdensity.ops.rows_operator import _launch

# one warp; a block; unaligned rows; a block of eight quads a thread; chunks
COLUMNS = (12, 3072, 3071, 9000, 20_004)


def problems(columns: int) -> list[Problem]:
    """Each rule, each number of operands, both sources of noise, numbers for all rows and numbers per row."""
    options = {"rows": 2, "columns": columns, "device": "cuda"}
    return [
        random_problem("drift", **options),
        random_problem("radius", per_row=False, **options),
        random_problem("prediction", "velocity", cfg=True, dtype=torch.bfloat16, **options),
        random_problem("step", "epsilon", per_row=False, **options),
        random_problem("step", "sample", cfg=True, noise="drawn", **options),
        random_problem("step", "v_prediction", noise="given", dtype=torch.float16, **options),
        random_problem("step", "edm", cfg=True, noise="drawn", dtype=torch.float64, **options),
    ]


def main() -> None:
    with use("cuda"):
        for columns in COLUMNS:
            for problem in problems(columns):
                out, report = _launch(
                    problem.rule, problem.kind, problem.operands, problem.parameters, problem.noise_key, None, True,
                    problem.like,
                )  # fmt: skip
                assert_as_good_as_eager(problem, out, report)
    print("every launch is right")


if __name__ == "__main__":
    main()
