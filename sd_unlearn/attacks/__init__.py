"""Attacks: can a removed concept be brought back? One file an attack, all listed in `registry`."""
