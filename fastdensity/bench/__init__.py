"""How the estimators of the divergence compare: measurements behind `fastdensity bench`, timing and memory for all."""
