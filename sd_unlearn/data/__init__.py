"""From concept and prompts to images, latents and batches."""
