"""Evaluate LoRAs and image folders with metrics; `evaluate.py` is the command."""
