"""Files, images, schemas and the layout of run folders."""
