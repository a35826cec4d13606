"""Triton kernels, one operation per file; imported as ``spnet.kernels``."""
