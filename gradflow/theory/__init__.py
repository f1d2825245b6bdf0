"""What theory predicts of a run, and how far off it is."""
