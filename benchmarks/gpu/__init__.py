"""The steps of benchmarks/gpu.py: `products` of random planes, `models`, and their `timing`."""
