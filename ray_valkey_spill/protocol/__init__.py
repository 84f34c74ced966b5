"""Connections to servers; knows no objects. Imports neither `format` nor a layer above it."""
