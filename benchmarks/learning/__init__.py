"""Proof of learning: reward curves over several seeds, on tasks whose yardsticks others have published."""
