"""Triton kernels of QuantFlow, and in `reference` a plain-torch oracle for each."""
