"""Quantized forms of one model beside what others make of it: bits, quality with intervals, processor time, memory.

Rows of ours are made by the project's command line as ``rows.toml`` lists them; peers are round-to-nearest on the same
grids, and the libraries that are installed (HQQ, GPTQModel). Each is made by a process of its own, whose processor time
and peak memory are the operating system's count; each is read back as dense fp32 weights and measured on the same windows
beside the model itself. A peer that is not installed, or fails here, is said to be missing.
"""
