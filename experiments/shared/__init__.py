"""What the experiments share: rows, figures, runs, the record, the command line."""
