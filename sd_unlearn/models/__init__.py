"""Base models: found, loaded, sampled and given a LoRA."""
