"""Kernels, each beside its plain-PyTorch reference; a file here is imported only by the architectures that use it."""
