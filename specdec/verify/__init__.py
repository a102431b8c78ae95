"""Acceptance rules: which drafted tokens are kept. Every rule is lossless for the trees it admits, and refuses the rest."""
