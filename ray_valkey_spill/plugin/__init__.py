"""The Ray plug-in: the only layer that imports ray. It does not import `cli`."""
