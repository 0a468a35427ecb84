"""Gemma 3 (text): windows with a rotation of their own, query and key norms, norms before and after."""
