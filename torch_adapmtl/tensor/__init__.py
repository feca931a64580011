"""One tensor made sparse: the soft threshold, as a function and as a parametrization."""
