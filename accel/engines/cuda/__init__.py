"""The ``cuda`` engine: the bundle's fused graph on our own Triton kernels and cuBLAS, replayed as CUDA graphs.

No architecture is named here: what the graph says is what runs.

- ``program``: the graph and its weights on the device.
- ``values``: results that wait for their reader, so that a kernel can take two nodes at once.
- ``products``, ``attention``: which kernel for which shape; ``tiles``: its tiles; ``contest``: the fastest, by
  measurement.
- ``executor``: node after node; ``replay``: the same, recorded.
- ``operator_times``: where a run's time goes.
- ``decoder``, ``encoder``: the sessions; ``registry``: whether and how to open them.
"""
