"""Tree builders: what shape the candidates take."""
