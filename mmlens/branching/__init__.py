"""Runs that start where they differ from a finished one."""
