"""Objects of a node: put, find, fill, delete, clean up. Imports no `plugin`, no `cli`."""
