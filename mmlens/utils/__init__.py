"""Helpers that know no model: files, memory, threads, tensors, statistics."""
