"""How convert() finds what may be fused, and what it puts there."""
