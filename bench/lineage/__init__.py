"""Scripts behind the evidence: what null distributions are made of, and the error they really have."""
