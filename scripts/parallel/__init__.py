"""The engines of scripts/engines.py."""
