"""A room per op: boundary checks, the registered operator with its fake, and the launcher of the kernels."""
