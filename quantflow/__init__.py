"""QuantFlow: offline quantisation and conversion of large language models."""

__version__ = "0.1.0"
