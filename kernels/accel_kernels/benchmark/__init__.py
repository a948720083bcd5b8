"""Each kernel's times on the GPU at hand, its roofline, and plain PyTorch: ``python -m accel_kernels.benchmark``.

A row is one kernel at one shape of a model. ``float_products``, ``quantized_products``, ``attention`` and ``vectors``
hold them by family, ``shapes`` the models' sizes.
"""
