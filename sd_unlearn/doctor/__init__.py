"""sd-unlearn doctor: whether everything works on this computer, as text that can be pasted into an issue."""
