"""Export a finished run for other software: Diffusers, ComfyUI, A1111, Forge and the Hugging Face hub."""
