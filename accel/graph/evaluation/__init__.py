"""Computes a lowered graph without the engine that it is meant for, to see what its numbers are."""
