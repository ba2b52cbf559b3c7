"""Open Inference Protocol v2 over REST, with the extensions for binary tensors, parameters and statistics.

Sources: the protocol's REST specification (github.com/kserve/open-inference-protocol) and NVIDIA Triton's documents of
its extensions `binary_tensor_data`, `parameters` and `statistics`.
"""
