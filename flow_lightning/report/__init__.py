"""What a run writes: numbers, tables, pictures."""
