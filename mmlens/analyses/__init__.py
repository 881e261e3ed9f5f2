"""Analyses of a model, one file each, and what they share.

A file is called as its function, so the functions themselves are imported from `mmlens`
(`mmlens.causal_trace`) or from their file. Each analysis uses what a user can call, and so is an
example for the next one.
"""
