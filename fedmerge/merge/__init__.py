"""Merging methods, one file each."""
