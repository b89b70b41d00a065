"""Typed options of every command."""
