"""Puts, fetches, deletes and cleans up objects of a node. Imports neither `plugin` nor `cli`."""
