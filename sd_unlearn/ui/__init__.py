"""A local page to try LoRAs, read reports and start trainings; `server.py` is the command."""
