"""Atoll: train one diffusion model on separate islands, and forget exactly."""

__version__ = "0.1.0"
