"""What two fingerprints say about shared lineage, and how far that can be trusted.

`comparison` puts the parts together: `profile` (the published score, beside unrelated models), `residual` (an exact
permutation test on residual coordinates) and `verdict` (what may be concluded from the tests that were valid). Only
fingerprints are read here, never weights.
"""
