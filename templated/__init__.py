"""templated: virtual machines that start the way processes fork."""

__version__ = "0.1.0"
