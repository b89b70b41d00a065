"""Metrics of generated images, one file per metric; `base.py` is the contract."""
