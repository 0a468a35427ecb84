"""Gemma 2: softcaps, a window in every second layer, norms before and after."""
