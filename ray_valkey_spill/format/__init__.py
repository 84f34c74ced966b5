"""Names and bytes of spilled objects. Imports neither `protocol` nor a layer above it."""
