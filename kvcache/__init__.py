"""Who owns which page, in which precision tier. No model code."""
