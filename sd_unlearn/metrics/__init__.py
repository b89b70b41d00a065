"""Questions asked of images, one file a question."""
