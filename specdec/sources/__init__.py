"""Draft sources: where candidate tokens come from."""
