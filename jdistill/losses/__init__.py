"""Objectives as pure functions on the target grid [B, T]: per token in, per token out; `masked` alone reduces."""
