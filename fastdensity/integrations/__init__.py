"""Density guidance inside the samplers that people already run: one file per host, imported when it is asked for."""
