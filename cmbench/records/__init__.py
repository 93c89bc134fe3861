"""What a cell leaves: the schema of records, reading, writing, provenance, the workspace."""
