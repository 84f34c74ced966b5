"""Names and byte format of spilled objects. Imports neither `protocol` nor a layer above it."""
