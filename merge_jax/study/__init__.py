"""The engine of experiments: options, methods, trials and their runs, grids of them and reports."""
