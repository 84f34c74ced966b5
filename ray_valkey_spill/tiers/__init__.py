"""Where bytes are stored, with the metadata and the budget. Imports no layer above it."""
