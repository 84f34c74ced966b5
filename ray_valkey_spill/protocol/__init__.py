"""Connections to servers. Knows no objects; imports neither `format` nor a layer above it."""
