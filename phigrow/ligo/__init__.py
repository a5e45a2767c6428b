"""Learned growth (LiGO): matrices of a plan, trained."""
