"""One torch reference per kernel: the oracle of the tests, the slow backend, the baseline of the benchmarks."""
