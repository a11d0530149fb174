"""Measurements of many requests on one engine."""
