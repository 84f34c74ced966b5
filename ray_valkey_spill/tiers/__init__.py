"""The tiers that hold values, with the metadata and the budget. Imports no layer above it."""
