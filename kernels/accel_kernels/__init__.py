"""Fused ops, one per file: definition, ONNX function body, reference, kernel, tolerance.

The folder above has no ``__init__.py`` on purpose: as a package named ``kernels`` it would
shadow the library of that name, which transformers imports.
"""
